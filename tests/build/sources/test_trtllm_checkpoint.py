"""TensorRT-LLM checkpoint folders as sources: cut again for other GPUs, not a value touched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from enginehouse.build import cli
from enginehouse.build.plan.build_plan import make_plan
from enginehouse.build.plan.settings import load_settings
from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.build.source import SourceCheckpoint
from enginehouse.build.sources.hf_checkpoint import open_checkpoint
from enginehouse.runtime.engine import read_engine
from enginehouse.runtime.errors import CheckpointError, EnginehouseError, PlanError
from makers.engines import build_engine, write_tiny_checkpoint
from makers.quantized_writers import KINDS, write_quantized

pytestmark = pytest.mark.usefixtures("one_thread")

FORMS = ("none", "int4", "int8", "fp8", "awq", "modelopt int4 awq", "rowwise")
ROWWISE = "compressed-tensors fp8 dynamic"


def opened(path: Path) -> SourceCheckpoint:
    return resolve_source(str(path), path)


@pytest.fixture(scope="module")
def source_of(
    tmp_path_factory: pytest.TempPathFactory, tiny_source: SourceCheckpoint
) -> Callable[[str], tuple[SourceCheckpoint, dict[str, Any]]]:
    """A source for each form of checkpoint, and the settings that make it."""
    made: dict[str, SourceCheckpoint] = {}

    def source(form: str) -> tuple[SourceCheckpoint, dict[str, Any]]:
        kind = ROWWISE if form == "rowwise" else form
        if kind not in KINDS:
            few = {"calib_samples": 1, "calib_length": 16} if form == "fp8" else {}
            group = {"group_size": 64} if form == "int4" else {}
            return tiny_source, {"quant": form, **few, **group}
        if kind not in made:
            made[kind] = opened(write_quantized(kind, tmp_path_factory.mktemp("in")).quantized)
        return made[kind], {}

    return source


def raw(directory: Path) -> dict[str, bytes]:
    """Every rank file's tensors as bytes, and the config."""
    found = {"config.json": (directory / "config.json").read_bytes()}
    for path in sorted(directory.glob("rank*.safetensors")):
        for name, tensor in load_file(path).items():
            data = tensor.contiguous().view(-1).view(torch.uint8)
            head = f"{tensor.dtype} {list(tensor.shape)} ".encode()
            found[f"{path.name}/{name}"] = head + data.numpy().tobytes()
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("first", "second"), [((1, 1), (2, 2)), ((4, 1), (2, 1)), ((2, 2), (1, 1))]
)
def test_cutting_a_checkpoint_again_equals_cutting_the_source(
    form: str,
    first: tuple[int, int],
    second: tuple[int, int],
    source_of: Callable[[str], tuple[SourceCheckpoint, dict[str, Any]]],
    tmp_path: Path,
) -> None:
    """Bit for bit, packed nibbles, scales and zeros included."""
    source, settings = source_of(form)
    if first[0] == 4 and form in ("awq", "modelopt int4 awq"):
        first = (2, 1)  # groups of 64 of a width of 256 go no further
    one, other, direct = (tmp_path / name for name in ("one", "other", "direct"))
    build_engine(source, one, tp=first[0], pp=first[1], until="convert", **settings)
    build_engine(opened(one), other, tp=second[0], pp=second[1], until="convert")
    build_engine(source, direct, tp=second[0], pp=second[1], until="convert", **settings)
    found, wanted = raw(other), raw(direct)
    assert found.keys() == wanted.keys()
    different = [name for name in wanted if found[name] != wanted[name]]
    assert not different


def as_convert_scripts_write(directory: Path) -> None:
    """FP8 as int8, the embedding whole on each rank, lm_head filled up: all are legal."""
    config = json.loads((directory / "config.json").read_text())
    config["use_parallel_embedding"] = False
    config["mapping"] = {"world_size": 2, "tp_size": 2, "pp_size": 1, "moe_tp_size": 2}
    config["producer"] = {"name": "modelopt"}
    (directory / "config.json").write_text(json.dumps(config))
    ranks = [directory / f"rank{rank}.safetensors" for rank in (0, 1)]
    files = [load_file(path) for path in ranks]
    name = "transformer.vocab_embedding.weight"
    whole = torch.cat([file[name] for file in files])
    for path, file in zip(ranks, files, strict=True):
        file[name] = whole.clone()
        for key, tensor in file.items():
            if tensor.dtype == torch.float8_e4m3fn:
                file[key] = tensor.view(torch.int8)
        save_file(file, path)


def test_a_folder_of_the_convert_scripts_gives_the_same_engine(
    source_of: Callable[[str], tuple[SourceCheckpoint, dict[str, Any]]], tmp_path: Path
) -> None:
    source, settings = source_of("fp8")
    build_engine(source, tmp_path / "one", tp=2, until="convert", **settings)
    build_engine(source, tmp_path / "direct", tp=4, until="convert", **settings)
    as_convert_scripts_write(tmp_path / "one")
    build_engine(opened(tmp_path / "one"), tmp_path / "other", tp=4, until="convert")
    found, wanted = raw(tmp_path / "other"), raw(tmp_path / "direct")
    found.pop("config.json"), wanted.pop("config.json")
    assert found == wanted


def test_an_odd_vocabulary_loses_its_padding_before_it_is_cut_again(tmp_path: Path) -> None:
    source = open_checkpoint(write_tiny_checkpoint(tmp_path / "odd", vocab=509, tied=True))
    build_engine(source, tmp_path / "one", tp=4, until="convert")
    build_engine(opened(tmp_path / "one"), tmp_path / "other", tp=1, until="convert")
    tensors = load_file(tmp_path / "other" / "rank0.safetensors")
    assert tensors["lm_head.weight"].shape[0] == 509
    embedding = tensors["transformer.vocab_embedding.weight"]
    assert torch.equal(embedding, source.tensors.read("model.embed_tokens.weight"))


def test_a_tied_lm_head_may_be_missing(tmp_path: Path) -> None:
    source = open_checkpoint(write_tiny_checkpoint(tmp_path / "tied", tied=True))
    folder = build_engine(source, tmp_path / "one", until="convert")
    tensors = load_file(folder / "rank0.safetensors")
    head = tensors.pop("lm_head.weight")
    save_file(tensors, folder / "rank0.safetensors")
    build_engine(opened(folder), tmp_path / "other", until="convert")
    assert torch.equal(load_file(tmp_path / "other" / "rank0.safetensors")["lm_head.weight"], head)


def test_an_engine_needs_the_tokenizer_that_a_checkpoint_lacks(
    source_of: Callable[[str], tuple[SourceCheckpoint, dict[str, Any]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, _ = source_of("awq")
    folder = build_engine(source, tmp_path / "one", tp=2, until="convert")
    flags = [str(folder), "-o", str(tmp_path / "engine"), "--quiet", "--max-batch-size", "8"]
    assert cli.main(flags) == 2
    assert "holds no tokenizer; give" in capsys.readouterr().err
    assert not (tmp_path / "engine").exists()
    assert cli.main([*flags, "--tokenizer", str(source.path), "--tp", "1"]) == 0
    manifest = read_engine(tmp_path / "engine").manifest
    assert manifest.source["kind"] == "tensorrt_llm"
    assert manifest.model.eos_token_ids == source.eos_token_ids
    assert manifest.verify is not None and manifest.verify["mean_kl"] < 1e-3


def test_an_engine_of_ours_is_a_source_with_its_own_tokenizer(
    source_of: Callable[[str], tuple[SourceCheckpoint, dict[str, Any]]], tmp_path: Path
) -> None:
    source, _ = source_of("none")
    engine = build_engine(source, tmp_path / "one", tp=2, until="compile")
    other = build_engine(opened(engine), tmp_path / "other", tp=1, quant="int4", until="compile")
    assert read_engine(other).config.quantization.quant_algo == "W4A16_AWQ"
    assert (other / "tokenizer.json").exists() and (other / "chat_template.jinja").exists()


def test_a_folder_is_never_replaced_by_what_is_made_of_it(
    source_of: Callable[[str], tuple[SourceCheckpoint, dict[str, Any]]], tmp_path: Path
) -> None:
    source, _ = source_of("none")
    folder = build_engine(source, tmp_path / "one", until="convert")
    with pytest.raises(PlanError, match="is the source itself"):
        build_engine(opened(folder), folder, tp=2, until="convert")


def test_a_folders_tensors_read_as_hugging_faces(
    source_of: Callable[[str], tuple[SourceCheckpoint, dict[str, Any]]], tmp_path: Path
) -> None:
    for form in ("none", "awq"):
        source, settings = source_of(form)
        folder = build_engine(source, tmp_path / form, tp=2, until="convert", **settings)
        again = opened(folder).tensors
        assert again.infos.keys() <= source.tensors.infos.keys()
        for name, info in again.infos.items():
            found, truth = again.read(name), source.tensors.read(name)
            assert found.shape == info.shape == truth.shape
            torch.testing.assert_close(found.float(), truth.float(), rtol=1e-3, atol=1e-3)
        rows = again.read("model.layers.1.self_attn.k_proj.weight", slice(3, 9))
        assert torch.equal(rows, again.read("model.layers.1.self_attn.k_proj.weight")[3:9])


@pytest.mark.parametrize("algo", [None, "FP8", "INT8"])
def test_scales_of_an_fp8_kv_cache_are_found_by_layer(
    algo: str | None,
    source_of: Callable[[str], tuple[SourceCheckpoint, dict[str, Any]]],
    tmp_path: Path,
) -> None:
    source, settings = source_of("fp8")
    folder = build_engine(source, tmp_path / "one", pp=2, until="convert", **settings)
    for rank in (0, 1):
        tensors = load_file(folder / f"rank{rank}.safetensors")
        name = "transformer.layers.0.attention.kv_cache_scaling_factor"
        tensors[name] = torch.tensor([0.5 + rank])
        save_file(tensors, folder / f"rank{rank}.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization"]["kv_cache_quant_algo"] = algo
    (folder / "config.json").write_text(json.dumps(config))
    again = opened(folder)
    assert again.quantized is not None and again.engine_config is not None
    wanted = {0: 0.5, 1: 1.5} if algo == "FP8" else {}
    assert again.quantized.kv_scales(again.engine_config) == wanted


def quantization(key: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization"][key] = value
        (folder / "config.json").write_text(json.dumps(config))

    return change


def algo(name: str) -> Callable[[Path], None]:
    return quantization("quant_algo", name)


def key(name: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config[name] = value
        (folder / "config.json").write_text(json.dumps(config))

    return change


def fp8_head(folder: Path) -> None:
    for rank in (0, 1):
        tensors = load_file(folder / f"rank{rank}.safetensors")
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
        save_file(tensors, folder / f"rank{rank}.safetensors")


def spread_experts(folder: Path) -> None:
    key("moe", {"num_experts": 4, "top_k": 2})(folder)
    key("mapping", {"world_size": 2, "tp_size": 2, "moe_ep_size": 2})(folder)


def drop_rank(folder: Path) -> None:
    (folder / "rank1.safetensors").unlink()


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "rank1.safetensors")
    del tensors["transformer.layers.1.mlp.gate.weight"]
    save_file(tensors, folder / "rank1.safetensors")


def truncate(folder: Path) -> None:
    with (folder / "rank1.safetensors").open("r+b") as file:
        file.truncate(5000)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (algo("W4A16_GPTQ"), "arranged for the kernels of one kind of GPU"),
        (algo("W8A16"), "quant_algo=W8A16, whose weights were arranged for the kernels"),
        (algo("W4A16"), "quant_algo=W4A16, whose weights were arranged for the kernels"),
        (spread_experts, "spreads its experts over ranks .moe_ep_size=2.; wanted each expert cut"),
        (algo("W8A8_SQ_PER_CHANNEL"), "W8A8_SQ_PER_CHANNEL; wanted null, FP8, .* W4A8_AWQ, W8A16:"),
        (key("pretrained_config", {}), "compiled TensorRT-LLM engine"),
        (key("embedding_sharding_dim", 1), "embedding_sharding_dim=1; wanted 0"),
        (key("mapping", {"tp_size": 2, "world_size": 4}), "wanted cp_size=1 and world_size"),
        (key("architecture", "FalconForCausalLM"), "FalconForCausalLM is not supported"),
        (drop_rank, "has no rank1.safetensors; config.json says tp_size=2"),
        (drop_tensor, "rank1.safetensors has no tensor transformer.layers.1.mlp.gate.weight"),
        (truncate, "rank1.safetensors"),
        (
            key("hidden_size", 512),
            r"embedding.weight has shape \[256, 256\]; .* implies \[256, 512\]",
        ),
        (key("intermediate_size", 1024), r"mlp.fc.weight has shape \[128, 256\]; .* \[256, 256\]"),
        (key("num_key_value_heads", 8), r"attention.qkv.weight has shape \[128, 256\]"),
        (key("vocab_size", 500), r"vocab_embedding.weight has shape \[256, 256\]; .* \[250, 256\]"),
        (key("quantization", {}), "qkv.weight has dtype torch.int8; .* implies bfloat16"),
        (algo("FP8"), r"qkv.weight has shape \[128, 256\]; config.json implies \[256, 256\]"),
        (
            quantization("pre_quant_scale", True),
            "has no tensor transformer.layers.0.attention.qkv.prequant_scaling",
        ),
        (
            quantization("group_size", 128),
            r"qkv.weights_scaling_factor has shape \[256, 4\]; .* implies \[256, 2\]",
        ),
        (
            quantization("exclude_modules", ["*mlp*"]),
            "mlp.fc.weight has dtype torch.int8; config.json implies bfloat16",
        ),
        (fp8_head, "lm_head.weight has dtype torch.float8_e4m3fn; .* implies bfloat16"),
        (key("num_hidden_layers", 1), "holds transformer.layers.1.* gives its stage 1 layers"),
    ],
)
def test_a_folder_that_cannot_be_cut_again_is_refused_in_a_sentence(
    change: Callable[[Path], None],
    wanted: str,
    source_of: Callable[[str], tuple[SourceCheckpoint, dict[str, Any]]],
    tmp_path: Path,
) -> None:
    source, settings = source_of("int4")
    folder = build_engine(source, tmp_path / "one", tp=2, until="convert", **settings)
    change(folder)
    with pytest.raises(CheckpointError, match=wanted) as caught:
        opened(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("form", "settings", "wanted"),
    [
        ("int4", {"quant": "fp8"}, "stays in the form int4"),
        ("int4", {"group_size": 128}, "is not the checkpoint's own, 64"),
        ("int4", {"dtype": "float16"}, "in bfloat16 again; leave dtype out"),
        ("none", {"tp": 3, "pad": False}, "cannot be cut over tp=3"),
    ],
)
def test_a_plan_keeps_to_the_folders_own_form(
    form: str,
    settings: dict[str, Any],
    wanted: str,
    source_of: Callable[[str], tuple[SourceCheckpoint, dict[str, Any]]],
    tmp_path: Path,
) -> None:
    source, made = source_of(form)
    folder = build_engine(source, tmp_path / "one", until="convert", **made)
    with pytest.raises(EnginehouseError, match=wanted) as caught:
        make_plan(load_settings(settings), opened(folder))
    assert isinstance(caught.value, PlanError)


CALIBRATED = {"calib_samples": 1, "calib_length": 16}


@pytest.mark.parametrize(
    "settings",
    [
        {"quant": "int4_awq", "group_size": 64, **CALIBRATED},
        {"quant": "w4a8_awq", **CALIBRATED},
        {"quant": "int8"},
        {"quant": "int4", "group_size": 64, "exclude": "*mlp.proj"},
        {"quant": "fp8", "exclude": "*attention.dense", **CALIBRATED},
    ],
    ids=["int4_awq", "w4a8_awq", "int8", "int4 excluded", "fp8 excluded"],
)
def test_forms_of_ours_are_cut_again_untouched(
    settings: dict[str, Any], tiny_source: SourceCheckpoint, tmp_path: Path
) -> None:
    one, other, back = (tmp_path / name for name in ("one", "other", "back"))
    build_engine(tiny_source, one, until="convert", **settings)
    build_engine(opened(one), other, tp=2, pp=2, until="convert")
    build_engine(opened(other), back, until="convert")
    assert raw(one) == raw(back)


@pytest.mark.parametrize("quant", ["w4a8_awq", "int8"])
def test_an_engine_of_a_folder_is_verified_in_the_folders_form(
    quant: str, tiny_source: SourceCheckpoint, tmp_path: Path
) -> None:
    few = CALIBRATED if quant == "w4a8_awq" else {}
    folder = build_engine(tiny_source, tmp_path / "one", tp=2, quant=quant, until="convert", **few)
    engine = build_engine(
        opened(folder), tmp_path / "engine", tokenizer=str(tiny_source.path), until="verify"
    )
    opened_engine = read_engine(engine)
    before = json.loads((folder / "config.json").read_text())["quantization"]
    assert opened_engine.config.quantization.to_dict() == before
    assert opened_engine.manifest.choices["quant"] == quant
    with pytest.raises(PlanError, match=f"stays in the form {quant}; leave quant out"):
        make_plan(load_settings({"quant": "fp8_rowwise"}), opened(folder))


def test_a_w4a8_folder_as_modelopt_writes_it_keeps_its_scales(
    tiny_source: SourceCheckpoint, tmp_path: Path
) -> None:
    """float32 group scales and factors in the model's dtype, with a scale of its own each."""
    settings = {"quant": "w4a8_awq", "until": "convert", **CALIBRATED}
    folder = build_engine(tiny_source, tmp_path / "one", tp=2, **settings)
    for rank in (0, 1):
        path = folder / f"rank{rank}.safetensors"
        tensors = load_file(path)
        for i, (name, tensor) in enumerate(sorted(tensors.items())):
            if name.endswith("weights_scaling_factor"):
                tensors[name] = tensor.float() * 1.001
            if name.endswith(("weights_scaling_factor_2", "activation_scaling_factor")):
                tensors[name] = torch.tensor([0.5 + i / 64])
        save_file(tensors, path)
    other = build_engine(opened(folder), tmp_path / "other", until="convert")
    back = build_engine(opened(other), tmp_path / "back", tp=2, until="convert")
    assert raw(back) == raw(folder)
    scale = "transformer.layers.1.mlp.gate.weights_scaling_factor"
    assert load_file(other / "rank0.safetensors")[scale].dtype == torch.float32


def test_a_quantised_source_keeps_its_linears_beside_a_new_kv_cache(
    tiny_source: SourceCheckpoint, tmp_path: Path
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    build_engine(tiny_source, one, quant="fp8", until="convert", **CALIBRATED)
    tokenizer = {"tokenizer": str(tiny_source.path), **CALIBRATED}
    build_engine(opened(one), other, kv_cache_dtype="fp8", until="convert", **tokenizer)
    before, after = raw(one), raw(other)
    added = after.keys() - before.keys()
    assert added and all(name.endswith("kv_cache_scaling_factor") for name in added)
    assert all(after[name] == before[name] for name in before if name != "config.json")


def test_a_quantised_source_refuses_exclude_and_layers_of_another_stage(
    tiny_source: SourceCheckpoint, tmp_path: Path
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    few = {"quant": "int4", "group_size": 64, "until": "convert"}
    build_engine(tiny_source, one, exclude="*layers.0.*", **few)
    with pytest.raises(CheckpointError, match="attention.dense of layers 0 .* choose pp in 1$"):
        build_engine(opened(one), other, pp=2, until="convert")
    with pytest.raises(PlanError, match="leave exclude out"):
        build_engine(opened(one), other, exclude="*mlp.proj", until="convert")
