"""Types of the extension built from csrc/; addresses are `Tensor.data_ptr()`, 0 for none."""

PANEL_WIDTH: int

class PackedWeight:
    def __init__(self, panels: int, scales: int, format: str, /) -> None: ...

def available_isas() -> list[str]: ...
def isa() -> str: ...
def use_isa(name: str, /) -> None: ...
def lora_linear_forward(
    tokens: int,
    in_features: int,
    out_features: int,
    rank: int,
    x: int,
    weight: PackedWeight,
    bias: int,
    lora_a: int,
    lora_b: int,
    scaling: float,
    y: int,
    hidden: int,
    dropout_rate: int,
    dropout_key: int,
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
    weight: PackedWeight,
    lora_a: int,
    lora_b: int,
    hidden: int,
    scaling: float,
    dx: int,
    dlora_a: int,
    dlora_b: int,
    dropout_rate: int,
    dropout_key: int,
    num_threads: int,
    /,
) -> None: ...
def importance(
    in_features: int,
    out_features: int,
    rank: int,
    weight: PackedWeight,
    lora_a: int,
    lora_b: int,
    dlora_a: int,
    dlora_b: int,
    scaling: float,
    by_output: bool,
    share: int,
    phase: int,
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
def layer_norm_forward(
    tokens: int,
    features: int,
    x: int,
    residual: int,
    weight: int,
    bias: int,
    epsilon: float,
    y: int,
    kept: int,
    rstd: int,
    num_threads: int,
    /,
) -> None: ...
def layer_norm_again(
    tokens: int, features: int, normalised: int, weight: int, bias: int, y: int, num_threads: int, /
) -> None: ...
def layer_norm_backward(
    tokens: int, features: int, dy: int, normalised: int, weight: int, rstd: int, dz: int, num_threads: int, /
) -> None: ...
def swiglu_forward(
    size: int, gate: int, up: int, y: int, kept_gate: int, kept_up: int, num_threads: int, /
) -> None: ...
def swiglu_again(size: int, gate: int, up: int, y: int, num_threads: int, /) -> None: ...
def swiglu_backward(size: int, dy: int, gate: int, up: int, dgate: int, dup: int, num_threads: int, /) -> None: ...
def gelu_forward(size: int, x: int, y: int, kept: int, num_threads: int, /) -> None: ...
def gelu_again(size: int, x: int, y: int, num_threads: int, /) -> None: ...
def gelu_backward(size: int, dy: int, x: int, dx: int, num_threads: int, /) -> None: ...

class AttentionShape:
    def __init__(self, batch: int, tokens: int, heads: int, kv_heads: int, head_dim: int, /) -> None: ...

class AttentionCall:
    def __init__(
        self,
        q: int,
        k: int,
        v: int,
        cos: int,
        sin: int,
        rotation_stride: int,
        bias: int,
        valid: int,
        scale: float,
        causal: bool,
        num_threads: int,
        /,
    ) -> None: ...

def attention_forward(shape: AttentionShape, call: AttentionCall, out: int, lse: int, /) -> None: ...
def attention_backward(
    shape: AttentionShape, call: AttentionCall, out: int, lse: int, dout: int, dq: int, dk: int, dv: int, /
) -> None: ...
def cross_entropy(
    tokens: int, classes: int, logits: int, targets: int, scale: float, loss: int, num_threads: int, /
) -> None: ...
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
    packed: PackedWeight,
    num_threads: int,
    /,
) -> None: ...
def unpack_weight(
    packed: PackedWeight, out_features: int, in_features: int, weight: int, num_threads: int, /
) -> None: ...
