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
    check_rounds: Annotated[int, typer.Option(help="Tasks that a try-out waits for.", min=0)] = 0,
    check_model: Annotated[Path | None, typer.Option(help="GGUF file that a try-out profiles.")] = None,
) -> None:
    """Tell a finished image which fleet it belongs to."""
    from fedspine_edge.images.provision import Belonging, provision

    if wifi is not None and passphrase is None:
        passphrase = typer.prompt("Wi-Fi passphrase", hide_input=True, default="", show_default=False)
    told = Belonging(server, token, ca, name, wifi, passphrase or "", model, data, check_rounds, check_model)
    provision(image, told)
    typer.echo(f"{image} belongs to {server}; its device enrols when it starts")
