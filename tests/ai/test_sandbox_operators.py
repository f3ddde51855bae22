"""The static check of TorchScript: what it refuses, what it lets through, and where its list comes from."""

import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from fl_server_ai.containers.limits import Limits
from fl_server_ai.containers.torch_archive.scripts import ForbiddenOperator
from fl_server_ai.sandbox import allowed_operators
from fl_server_ai.sandbox.operators import check_script, check_source
from fl_server_core.exceptions import BadContainer
from tests.ai.torch_files import scripted

# The rule: public operators, and these of the private ones, which torch.jit and torch.export write.
_PRIVATE = """__and__ __contains__ __derive_index __getitem__ __iand__ __ilshift__ __interpolate __ior__ __irshift__
    __is__ __isnot__ __ixor__ __lshift__ __not__ __or__ __range_length __round_to_zero_floordiv __rshift__
    __upsample __upsample_bilinear __upsample_nearest __xor__ _adaptive_avg_pool2d _adaptive_avg_pool3d
    _addmm_activation _aminmax _assert_async _assert_scalar _assert_tensor_metadata _batch_norm_impl_index
    _cast_Byte _cast_Char _cast_Double _cast_Float _cast_Half _cast_Int _cast_Long _cast_Short
    _cdist_forward _conj _conj_copy _conj_physical _convolution _convolution_mode _dim_arange _embedding_bag
    _euclidean_dist _fft_c2c _fft_c2r _fft_r2c _functional_assert_async _functional_assert_scalar
    _index_put_impl_ _infer_size _linalg_det _linalg_eigh _linalg_slogdet _linalg_solve_ex _linalg_svd
    _list_to_tensor _local_scalar_dense _log_softmax _logcumsumexp _masked_softmax _native_batch_norm_legit
    _native_batch_norm_legit_functional _native_batch_norm_legit_no_training _native_multi_head_attention
    _nested_tensor_from_mask _nested_tensor_from_mask_left_aligned _no_grad_fill_ _no_grad_normal_
    _no_grad_uniform_ _no_grad_zero_ _pack_padded_sequence _pad_circular _pad_enum _pad_packed_sequence
    _pdist_forward _prelu_kernel _reshape_from_tensor _safe_softmax _scaled_dot_product_attention_math
    _scaled_dot_product_efficient_attention _scaled_dot_product_flash_attention
    _scaled_dot_product_flash_attention_for_cpu _set_item _shape_as_tensor _size_if_not_equal _softmax
    _sparse_log_softmax _sparse_softmax _stack _standard_gamma _tensor_to_list _to_copy
    _transform_bias_rescale_qkv _transformer_encoder_layer_fwd _trilinear _unique _unique2 _unsafe_index
    _unsafe_index_put _unsafe_view _unwrap_optional _upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_lanczos2d_aa
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d _weight_norm
    _weight_norm_interface"""
PRIVATE = frozenset(_PRIVATE.split())
DENIED = frozenset(
    {"save", "load", "from_file", "set_data", "backward", "retain_grad", "record_stream"}
)
# Backends reached past the dispatcher, and gradients: nothing that a forward pass names.
DENIED_PREFIXES = (
    "cudnn_", "miopen_", "mkldnn_", "mps_", "fbgemm_", "quantized_", "xnnpack_", "sspaddmm",
)  # fmt: skip
UNSAFE_TYPES = ("Storage", "RRef", "Stream", "torch.classes")
FILE_NAMES = frozenset({"filename", "file", "dir", "url", "address"})


def rule() -> set[str]:
    """The names in `aten` that are operators on tensors, numbers, texts and lists, by the installed torch."""
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("aten::")]
    unsafe = {
        schema.name.removeprefix("aten::")
        for schema in schemas
        for argument in schema.arguments
        if argument.name in FILE_NAMES or any(t in str(argument.type) for t in UNSAFE_TYPES)
    }
    names = {schema.name.removeprefix("aten::") for schema in schemas}
    return {
        name
        for name in names - unsafe - DENIED
        if (not name.startswith("_") or name in PRIVATE)
        and not name.startswith(DENIED_PREFIXES)
        and "backward" not in name
    }


def text() -> str:
    """The list's file as the rule has it."""
    body = textwrap.fill(" ".join(sorted(rule())), 96, initial_indent="    ", subsequent_indent="    ",
                         break_on_hyphens=False, break_long_words=False)  # fmt: skip
    return (
        '"""Operators in `aten` that a model may use: what tests/ai/test_sandbox_operators.py says of the pinned torch.\n\n'
        "Written by `python -m tests.ai.test_sandbox_operators`; read the difference before you commit it.\n"
        f'"""\n\n_ATEN = """\n{body}\n"""\nATEN = frozenset(_ATEN.split())\n'
    )


def test_the_list_is_what_the_rule_says_of_the_installed_torch() -> None:
    found = allowed_operators.ATEN

    missing, stale = rule() - found, found - rule()

    assert not missing, "run python -m tests.ai.test_sandbox_operators and read the difference"
    assert not stale, "run python -m tests.ai.test_sandbox_operators and read the difference"
    assert Path(str(allowed_operators.__file__)).read_text(encoding="utf-8") == text()


def test_what_reaches_files_is_not_on_the_list() -> None:
    refused = {"save", "load", "from_file", "set_", "to_here", "backward", "autograd", "classes"}

    assert not refused & allowed_operators.ATEN


MODULES: list[Callable[[], nn.Module]] = [
    lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.MaxPool2d(2), nn.GELU()),
    lambda: nn.Sequential(
        nn.ConvTranspose3d(1, 2, 3), nn.InstanceNorm3d(2), nn.AdaptiveAvgPool3d(1)
    ),
    lambda: nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.PixelShuffle(2)),
    lambda: nn.Sequential(nn.Embedding(4, 3), nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.Softmax(-1)),
    lambda: nn.LSTM(2, 3, num_layers=2, bidirectional=True, dropout=0.1),
    lambda: nn.GRU(2, 3),
    lambda: nn.RNN(2, 3),
    lambda: nn.MultiheadAttention(4, 2),
    lambda: nn.TransformerEncoderLayer(4, 2, 8),
    lambda: nn.Bilinear(2, 3, 4),
    lambda: nn.EmbeddingBag(4, 3),
    lambda: nn.AlphaDropout(),
]


@pytest.mark.parametrize("make", MODULES)
def test_layers_of_torch_are_let_through(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    scripted(make(), tmp_path / "layer.pt")

    check_script(tmp_path / "layer.pt", Limits())


class Control(nn.Module):
    """Uses what the language has."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Dropout()])

    def forward(
        self, x: torch.Tensor, scale: float = 1.5, name: str = 'it\'s "so"'
    ) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for index, layer in enumerate(self.layers):
            x = layer(x)
            found[f"{name}{index}"] = x * -scale
        rest = [y * 2 for y in found.values()]
        while len(rest) > 1 and bool(x.sum() < 1e9):
            rest.pop()
        if x.dim() != 2 or x.dtype == torch.float16:
            raise ValueError(f"no matrix: {x.shape}")
        assert x.numel() >= 0
        future = torch.jit.fork(torch.relu, x)
        found["last"] = torch.jit.wait(future) + torch.einsum("ij->i", x)[:, None] + float("inf")
        return found


def test_control_flow_texts_and_containers_are_let_through(tmp_path: Path) -> None:
    scripted(Control(), tmp_path / "control.pt")

    check_script(tmp_path / "control.pt", Limits())


HOSTILE = [
    'torch.save(x, "/tmp/f")',
    'torch . save(x, "/tmp/f")',
    'torch.\n    save(x, "/tmp/f")',
    'torch.from_file("/etc/passwd", None, 10)',
    'ops.aten.save(x, "/tmp/f")',
    'o = ops.aten\n  o.save(x, "/tmp/f")',
    "t = torch\n  t.relu(x)",
    "(torch).relu(x)",
    'torch.autograd.save(x, "/tmp/f")',
    "f = torch.save",
    'x.save("/tmp/f")',
    'getattr(x, "save")("/tmp/f")',
    "getattr(self, name)",
    'ops.image.read_file("/etc/passwd")',
    'ops.prim.rpc_sync("a", "b", ())',
    'ops.profiler._record_function_enter("a")',
    "ops.unknown.anything(x)",
    "torch.set_(x, x)",
    "torch.no_such_operator(x)",
    "__torch__.torch.classes.profiling._ScriptProfile()",
    "aten.save(x)",
]


@pytest.mark.parametrize("line", HOSTILE)
def test_an_operator_that_is_not_listed_is_named(line: str) -> None:
    with pytest.raises(ForbiddenOperator) as caught:
        check_source("code/__torch__.py", f"def forward(self, x):\n  {line}\n  return x\n")

    assert caught.value.error_code == "FORBIDDEN_OPERATOR"
    assert caught.value.data["operator"] in line.replace("\n    ", "").replace(" . ", ".")
    assert "upload it again" in caught.value.detail


@pytest.mark.parametrize(
    "line",
    [
        "x = 1  # torch.save",
        "x = 1\r torch.relu(x)",
        "x = 1 \\\n + 2",
        'x = r"\\" + "torch"',
        'x = """a"""',
        'x = f"{x}"',
        'x = "a',
        "x = \x00",
        "x = \u00e4",
        "\tx = 1",
        "x = 1 $ 2",
        "x = `1`",
    ],
)
def test_code_that_torch_would_not_write_so_is_refused(line: str) -> None:
    with pytest.raises(BadContainer):
        check_source("code/__torch__.py", f"def forward(self, x):\n  {line}\n  return x\n")


def test_an_own_function_may_be_called_like_an_operator() -> None:
    check_source("code/a.py", "def f(x):\n  return __torch__.my.save_all.save(x, )\n")


def test_code_that_is_no_python_file_is_refused(tmp_path: Path) -> None:
    scripted(nn.ReLU(), tmp_path / "old.pt")
    with (
        zipfile.ZipFile(tmp_path / "old.pt") as old,
        zipfile.ZipFile(tmp_path / "m.pt", "w") as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.writestr(f"{name.split('/')[0]}/code/more.txt", "torch.save")

    with pytest.raises(BadContainer, match=r"more\.txt"):
        check_script(tmp_path / "m.pt", Limits())


if __name__ == "__main__":
    Path(str(allowed_operators.__file__)).write_text(text(), encoding="utf-8")
