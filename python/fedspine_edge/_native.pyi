"""Types of the extension built from csrc/; addresses are `Tensor.data_ptr()`, 0 for none."""

PANEL_WIDTH: int

def available_isas() -> list[str]: ...
def isa() -> str: ...
def use_isa(name: str, /) -> None: ...
def lora_linear_forward(
    tokens: int,
    in_features: int,
    out_features: int,
    rank: int,
    x: int,
    panels: int,
    bias: int,
    lora_a: int,
    lora_b: int,
    scaling: float,
    y: int,
    hidden: int,
    num_threads: int,
    /,
) -> None: ...
def lora_linear_backward(
    tokens: int,
    in_features: int,
    out_features: int,
    rank: int,
    dy: int,
    x: int,
    panels: int,
    lora_a: int,
    lora_b: int,
    hidden: int,
    scaling: float,
    dx: int,
    dlora_a: int,
    dlora_b: int,
    num_threads: int,
    /,
) -> None: ...
def importance(
    in_features: int,
    out_features: int,
    rank: int,
    panels: int,
    lora_a: int,
    lora_b: int,
    dlora_a: int,
    dlora_b: int,
    scaling: float,
    by_output: bool,
    out: int,
    num_threads: int,
    /,
) -> None: ...
def rms_norm_forward(
    tokens: int, features: int, x: int, weight: int, epsilon: float, y: int, rstd: int, num_threads: int, /
) -> None: ...
def rms_norm_backward(
    tokens: int, features: int, dy: int, x: int, weight: int, rstd: int, dx: int, num_threads: int, /
) -> None: ...
def swiglu_forward(size: int, gate: int, up: int, y: int, num_threads: int, /) -> None: ...
def swiglu_backward(size: int, dy: int, gate: int, up: int, dgate: int, dup: int, num_threads: int, /) -> None: ...
def gather(
    data: int,
    stride: int,
    keep_rows: int,
    keep_columns: int,
    rows: int,
    columns: int,
    out: int,
    num_threads: int,
    /,
) -> None: ...
def pack_weight(
    data: int,
    stride: int,
    keep_rows: int,
    keep_columns: int,
    rows: int,
    columns: int,
    panels: int,
    num_threads: int,
    /,
) -> None: ...
def unpack_weight(panels: int, out_features: int, in_features: int, weight: int, num_threads: int, /) -> None: ...
