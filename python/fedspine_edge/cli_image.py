"""The command `image` of the program: parses, calls one function, prints."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

commands = typer.Typer()
image = typer.Typer(help="Device images: build, check, provision, write.", no_args_is_help=True)
commands.add_typer(image, name="image")

Image = Annotated[Path, typer.Argument(help="The image: IMAGE.img.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


@image.command("build")
def image_build(
    *,
    board: Annotated[str, typer.Option(help="A file in device_images/boards.")] = "generic-arm64",
    variant: Annotated[str, typer.Option(help="agent, or full with the worker that tunes.")] = "agent",
    out: Annotated[Path | None, typer.Option(help="Folder; dist/images/BOARD-VARIANT when not given.")] = None,
    key: Annotated[Path | None, typer.Option(help="Private Ed25519 key that signs; made when missing.")] = None,
    json: Json = False,
) -> None:
    """Build an image, from packages to a sealed folder."""
    from fedspine_edge.commands import image as command

    found = command.build(board, variant, out=out, key=key, tell=lambda line: typer.echo(line, err=True))
    typer.echo(json_module.dumps(found, indent=2) if json else command.build_text(found))


@image.command("provision")
def image_provision(
    image: Image,
    *,
    server: Annotated[str, typer.Option(help="https://HOST:PORT of the fleet's server.")],
    token: Annotated[
        str,
        typer.Option(
            help="As `fedspine devices token` prints it.", envvar="FEDSPINE_TOKEN", prompt=True, hide_input=True
        ),
    ],
    ca: Annotated[str | None, typer.Option(help="Fingerprint of its CA, where the token does not end in it.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the device; its own when not given.")] = None,
    wifi: Annotated[str | None, typer.Option(help="Name of a Wi-Fi network.")] = None,
    passphrase: Annotated[
        str | None, typer.Option("--wifi-passphrase", help="Asked for with --wifi.", envvar="FEDSPINE_WIFI_PASSPHRASE")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Base model that goes along: directory or GGUF file.")] = None,
    data: Annotated[Path | None, typer.Option(help="The device's examples, which go along: .jsonl or .csv.")] = None,
    updates: Annotated[str | None, typer.Option(help="Where newer releases lie: http://HOST/FOLDER.")] = None,
    check_rounds: Annotated[int, typer.Option(help="Tasks that a try-out waits for.", min=0)] = 0,
    check_model: Annotated[Path | None, typer.Option(help="GGUF file that a try-out profiles.")] = None,
) -> None:
    """Tell a finished image which fleet it belongs to."""
    from fedspine_edge.images.provision import Belonging, provision

    if wifi is not None and passphrase is None:
        passphrase = typer.prompt("Wi-Fi passphrase", hide_input=True, default="", show_default=False)
    told = Belonging(server, token, ca, name, wifi, passphrase or "", model, data, updates, check_rounds, check_model)
    provision(image, told)
    typer.echo(f"{image} belongs to {server}; its device enrols when it starts")


@image.command("verify")
def image_verify(
    image: Image,
    *,
    key: Annotated[Path | None, typer.Option(help="Public key one trusts; the one beside the image otherwise.")] = None,
    json: Json = False,
) -> None:
    """Check an image's seal, partitions and root file system."""
    from fedspine_edge.images.verify import verify

    found = verify(image, key)
    state = {None: "sealed", False: "as built", True: "as built but for its config partition"}[
        found["found"]["provisioned"]
    ]
    trust = "" if found["found"]["trusted_key"] else "; who made it is not proved without --key"
    typer.echo(json_module.dumps(found, indent=2) if json else f"{image}: {state}{trust}")


@image.command("update")
def image_update(
    image: Image,
    *,
    out: Annotated[Path, typer.Option(help="Folder; put it on any web server.")],
    key: Annotated[Path | None, typer.Option(help="Private key the running images were built with.")] = None,
    release: Annotated[int | None, typer.Option(help="Its number; the time of its sources when not given.")] = None,
) -> None:
    """Make a signed update of an image, for boards that ask for one."""
    from fedspine_edge.commands import image as command

    found = command.make_update(image, out, key=key, release=release)
    typer.echo(f"release {found['release']} for {found['board']}, {found['variant']} in {out}")


@image.command("flash")
def image_flash(
    image: Image,
    target: Annotated[Path, typer.Argument(help="A whole disk, e.g. /dev/sdb.")],
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Write an image to a disk that nobody uses, and read it back."""
    from fedspine_edge.images import flash

    found = flash.plan(image, target)
    typer.echo(found.text())
    if not yes:
        typer.confirm("write it?", abort=True)
    with typer.progressbar(length=2 * found.num_bytes, label="writing, reading back") as bar:
        digest = flash.write(found, tell=lambda done: bar.update(done - bar.pos))
    typer.echo(f"written and read back, SHA-256 {digest}")


@image.command("l4t")
def image_l4t(
    *,
    board: Annotated[str, typer.Option(help="tx2, xavier-nx, agx-orin or orin-nano.")],
    bsp: Annotated[Path, typer.Option(help="NVIDIA's Jetson_Linux_R..._aarch64.tbz2.")],
    rootfs: Annotated[Path, typer.Option(help="NVIDIA's Tegra_Linux_Sample-Root-Filesystem_R..._aarch64.tbz2.")],
    runtime: Annotated[Path, typer.Option(help="A generic image; its root file system becomes the runtime.")],
    work: Annotated[Path, typer.Option(help="Where the tarballs are unpacked.")] = Path("jetson"),
    config: Annotated[Path | None, typer.Option(help="fedspine.toml of the device.")] = None,
    user: Annotated[str, typer.Option(help="The first user.")] = "fedspine",
    host: Annotated[str, typer.Option(help="Name of the board.")] = "fedspine",
    accept_license: Annotated[
        bool, typer.Option("--accept-license", help="You have read NVIDIA's licence and accept it.")
    ] = False,
    massflash: Annotated[int, typer.Option(help="Boards at once.", min=0)] = 0,
    execute: Annotated[bool, typer.Option("--execute", help="Run the commands instead of printing them.")] = False,
) -> None:
    """Flash a Jetson by NVIDIA's tools, with this runtime on it; prints every command."""
    import os

    from fedspine_edge.commands import image as command
    from fedspine_edge.images.l4t import Wish

    wish = Wish(board, bsp, rootfs, runtime, work.resolve(), config, user, host, accept_license, massflash)
    # A hash, from the environment: a command line is everybody's to read. Without one the user has no password.
    password = os.environ.get("FEDSPINE_PASSWORD_HASH", "!")
    command.flash_jetson(wish, execute=execute, password_hash=password, tell=typer.echo)
