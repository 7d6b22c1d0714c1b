"""A plan equals TensorRT-LLM's own tables, and what is illegal never gets as far as a weight."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from enginehouse.build.forms.weight_forms import GROUP_SIZES, QUANT_CONFIGS
from enginehouse.build.plan.build_plan import make_plan, output_tensors
from enginehouse.build.plan.cuts import check_mapping, check_stages, choose_group_size, legal_tp
from enginehouse.build.plan.settings import BuildSettings, load_settings
from enginehouse.build.source import SourceCheckpoint
from enginehouse.build.sources.hf_checkpoint import open_checkpoint
from enginehouse.runtime.config import Mapping, ModelConfig
from enginehouse.runtime.errors import CheckpointError, PlanError
from makers.engines import write_tiny_checkpoint
from makers.paths import CONTRACT

QUANT_OF_FILE = {
    "none": "none",
    "fp8": "fp8",
    "fp8_kvfp8": "fp8",
    "fp8_rowwise": "fp8_rowwise",
    "w4a16_awq": "int4_awq",
    "w4a16_awq_nopqs": "int4",
    "w4a8_awq": "w4a8_awq",
    "w8a16": "int8",
}
TABLES = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted(CONTRACT.glob("*.json"))
    if path.stem.split(".")[-1] in QUANT_OF_FILE
}
CASES = [(table, case) for table, data in TABLES.items() for case in data["cases"]]
# group_size 128 does not divide 576
PADDED = [f"smollm2-135m.{form}" for form in ("w4a16_awq", "w4a16_awq_nopqs", "w4a8_awq")]


def contract_case(table: str, case: str) -> tuple[ModelConfig, Mapping, dict[str, Any]]:
    data = TABLES[table]
    config = ModelConfig.from_dict(data["meta"]["config"])
    group_size = int(
        re.search(r"group_size (\d+|None)", data["meta"]["note"])[1].replace("None", "0")
    )
    kv_cache = "FP8" if table.endswith("_kvfp8") else None
    quant = replace(
        QUANT_CONFIGS[QUANT_OF_FILE[table.split(".")[-1]]],
        group_size=group_size,
        kv_cache_quant_algo=kv_cache,
    )
    tp, pp = (int(number) for number in re.findall(r"\d+", case))
    return replace(config, quantization=quant), Mapping(tp, pp), data["cases"][case]


def test_all_tables_of_the_contract_are_there() -> None:
    assert len(TABLES) == 19 and len(CASES) == 134


@pytest.mark.parametrize(("table", "case"), CASES)
def test_rank_files_equal_the_contract(table: str, case: str) -> None:
    config, mapping, wanted = contract_case(table, case)
    quant = QUANT_OF_FILE[table.split(".")[-1]]
    if "NotImplementedError" in str(wanted.get("illegal")):
        with pytest.raises(PlanError, match="group_size=64 has no kernel for w4a8_awq; choose 128"):
            choose_group_size(config.with_mapping(mapping), 64, quant)
        return
    if "illegal" in wanted:
        with pytest.raises(PlanError, match=f"cannot be cut over tp={mapping.tp_size}; choose tp"):
            check_mapping(config, mapping.tp_size)
        return
    check_mapping(config, mapping.tp_size)
    config = config.with_mapping(mapping)
    if table in PADDED:
        legal = "none; legal tp .*: none" if quant == "w4a8_awq" else "64; legal tp .*: 1, 3"
        with pytest.raises(PlanError, match=f"legal group_size at this tp: {legal}"):
            choose_group_size(config, 128, quant)
        if quant != "w4a8_awq":
            assert choose_group_size(config, None, quant) == 64
        return
    if quant in GROUP_SIZES:
        group_size = config.quantization.group_size
        assert choose_group_size(config, group_size, quant) == group_size
    for pp_rank in range(mapping.pp_size):
        stage = wanted[f"pp_rank{pp_rank}"]
        assert stage["ranks"] == [mapping.rank(pp_rank, tp) for tp in range(mapping.tp_size)]
        found = output_tensors(config, pp_rank)
        assert set(found) == set(stage["checkpoint_tensors"])
        for name, (shape, dtypes) in stage["checkpoint_tensors"].items():
            assert list(found[name].shape) == shape, name
            assert found[name].dtype in dtypes.split("|"), name


def small_config(**changes: Any) -> ModelConfig:
    sizes = dict(hidden_size=1024, num_attention_heads=8, num_key_value_heads=2, head_size=128)
    return ModelConfig(
        architecture="LlamaForCausalLM",
        dtype="bfloat16",
        vocab_size=1001,
        num_hidden_layers=3,
        norm_epsilon=1e-5,
        max_position_embeddings=2048,
        **{**sizes, "intermediate_size": 2048, **changes},
    )


def test_kv_heads_are_duplicated_and_the_vocabulary_padded() -> None:
    table = output_tensors(small_config().with_mapping(Mapping(4, 1)), 0)
    assert table["transformer.layers.0.attention.qkv.weight"].shape == ((2 + 2) * 128, 1024)
    assert table["lm_head.weight"].shape == (251, 1024)
    assert table["transformer.vocab_embedding.weight"].shape == (251, 1024)


def test_row_linears_keep_their_whole_bias_on_each_rank() -> None:
    config = small_config(attn_bias=True, mlp_bias=True).with_mapping(Mapping(2, 1))
    shapes = {name: tensor.shape for name, tensor in output_tensors(config, 0).items()}
    prefix = "transformer.layers.1."
    assert shapes[f"{prefix}attention.qkv.bias"] == (768,)
    assert shapes[f"{prefix}attention.dense.bias"] == (1024,)
    assert shapes[f"{prefix}mlp.fc.bias"] == shapes[f"{prefix}mlp.gate.bias"] == (1024,)
    assert shapes[f"{prefix}mlp.proj.bias"] == (1024,)


@pytest.mark.parametrize(
    ("sizes", "tp", "pp", "wanted"),
    [
        (
            dict(num_key_value_heads=8),
            3,
            1,
            "num_key_value_heads=8 .* tp=3; choose tp in 1, 2, 4, 8",
        ),
        (
            dict(num_attention_heads=9, num_key_value_heads=3, intermediate_size=576),
            6,
            1,
            "num_attention_heads=9 .* tp=6; .* 1, 3, 9",
        ),
        (dict(intermediate_size=1026), 4, 1, "intermediate_size=1026 .* tp=4; choose tp in 1, 2"),
        ({}, 1, 4, "num_hidden_layers=3 cannot be cut over pp=4; choose pp in 1 to 3"),
    ],
)
def test_an_illegal_cut_names_the_legal_ones(
    sizes: dict[str, int], tp: int, pp: int, wanted: str
) -> None:
    with pytest.raises(PlanError, match=wanted):
        check_mapping(small_config(**sizes), tp)
        check_stages(small_config(**sizes), pp)


@pytest.mark.parametrize(
    ("sizes", "tp", "asked", "wanted"),
    [
        ({}, 1, None, 128),
        ({}, 8, None, 128),
        (dict(intermediate_size=1536), 8, None, 64),
        ({}, 1, 64, 64),
        ({}, 1, 32, "group_size=32 has no kernel for int4; choose 128, 64"),
        (dict(intermediate_size=1536), 8, 128, "mlp.fc has out_features=192 per rank at tp=8"),
        (dict(intermediate_size=1032), 1, None, "group_size at this tp: none; .* int4: none"),
        (dict(hidden_size=1088), 2, None, "attention.qkv has in_features=1088, uncut at tp=2"),
    ],
)
def test_the_group_size_fits_every_linear_or_is_refused(
    sizes: dict[str, int], tp: int, asked: int | None, wanted: int | str
) -> None:
    config = small_config(**sizes).with_mapping(Mapping(tp, 1))
    if isinstance(wanted, int):
        assert choose_group_size(config, asked) == wanted
    else:
        with pytest.raises(PlanError, match=wanted):
            choose_group_size(config, asked)


def test_legal_sizes_are_listed() -> None:
    assert legal_tp(small_config()) == [1, 2, 4, 8]
    assert legal_tp(small_config(intermediate_size=1536), (128,)) == [1, 2, 4]
    assert legal_tp(small_config(intermediate_size=1536), GROUP_SIZES["int4"]) == [1, 2, 4, 8]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceCheckpoint:
    return open_checkpoint(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny-llama"))


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("quant", QUANT_CONFIGS)
def test_the_tiny_checkpoint_can_be_planned(source: SourceCheckpoint, quant: str, tp: int) -> None:
    if (quant, tp) == ("w4a8_awq", 4):
        with pytest.raises(PlanError, match="w4a8_awq: .*; legal tp for w4a8_awq: 1, 2"):
            make_plan(load_settings({"quant": quant, "tp": tp, "pad": False}), source)
        return
    plan = make_plan(load_settings({"quant": quant, "tp": tp, "pp": 2}), source)
    assert plan.name == "tiny-llama" and plan.max_seq_len == 2048
    assert plan.config.mapping == Mapping(tp, 2)
    assert plan.config.use_parallel_embedding == (tp > 1)
    assert plan.config.quantization.quant_algo == QUANT_CONFIGS[quant].quant_algo
    assert plan.group_size == ((128 if tp < 4 else 64) if quant in GROUP_SIZES else None)
    assert len(plan.rank_bytes) == 2 * tp
    infos = source.tensors.infos.values()
    assert plan.num_parameters == sum(int.__mul__(*(*info.shape, 1)[:2]) for info in infos)
    if quant == "none" and tp == 1:
        assert sum(plan.rank_bytes) == 2 * plan.num_parameters


def test_a_config_alone_can_be_planned_but_not_built(
    source: SourceCheckpoint, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text((source.path / "config.json").read_text())
    alone = open_checkpoint(tmp_path)
    wanted = make_plan(load_settings({"until": "plan"}), source)
    assert make_plan(load_settings({"until": "plan"}), alone).rank_bytes == wanted.rank_bytes
    with pytest.raises(CheckpointError, match="holds no model.safetensors"):
        make_plan(load_settings({}), alone)


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ({"tp": 3, "pad": False}, "choose tp in 1, 2, 4, 8; or leave --no-pad out"),
        ({"max_seq_len": 4096}, "max_seq_len=4096 is above .*=2048; choose at most 2048"),
        ({"max_num_tokens": 8}, "max_num_tokens=8 is below max_batch_size=64"),
        ({"kv_block_size": 24}, "kv_block_size=24 is not a power of two"),
        ({"group_size": 64}, "group_size is of no use with quant=none"),
        (
            {"quant": "int4", "dtype": "float32", "backend": "tensorrt_llm"},
            "no int4 kernels for dtype=float32",
        ),
    ],
)
def test_choices_that_contradict_are_refused(
    source: SourceCheckpoint, flags: dict[str, Any], wanted: str
) -> None:
    with pytest.raises(PlanError, match=wanted):
        make_plan(load_settings(flags), source)


def test_a_sliding_window_is_carried_and_bounds_nothing(source: SourceCheckpoint) -> None:
    config = {**source.config, "architectures": ["MistralForCausalLM"], "sliding_window": 1024}
    plan = make_plan(load_settings({}), replace(source, config=config))
    assert plan.max_seq_len == 2048
    assert plan.config.extra["max_attention_window"] == [1024, 1024]


def test_every_setting_says_what_it_is() -> None:
    for item in fields(BuildSettings):
        assert item.metadata["doc"], item.name


def test_flags_override_yaml_and_yaml_overrides_defaults(tmp_path: Path) -> None:
    path = tmp_path / "build.yaml"
    path.write_text("quant: int4\ntp: 2\nkv_cache_gib: 1\nname: null\n")
    settings = load_settings({"tp": 4, "pp": None}, path)
    assert settings == BuildSettings(quant="int4", tp=4, kv_cache_gib=1)
    path.write_text("")
    assert load_settings({}, path) == BuildSettings()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("max_batchsize: 8", "unknown key 'max_batchsize'; did you mean max_batch_size?"),
        ("zzz: 1", "unknown key 'zzz'; choose among model, output"),
        ("1: 2", "unknown key 1; choose among"),
        ("tp: two", "tp is str 'two'; wanted int"),
        ("tp: true", "tp is bool True; wanted int"),
        ("tp: 1.0", "tp is float 1.0; wanted int"),
        ("tp: null", "tp is NoneType None; wanted int"),
        ("tp: 0", "tp=0 is out of range; wanted 1 or more"),
        ("kv_cache_gib: .nan", "kv_cache_gib=nan is out of range"),
        (
            "quant: int5",
            "quant='int5' is not known; choose one of auto, none, fp8, fp8_rowwise, int4",
        ),
        ("model: [a]", r"model is list \['a'\]; wanted str"),
        ("tp: 1\n  pp: 2", "not YAML at line 2: "),
        ("a: *b", "not YAML at line 1: "),
        ("- tp", "holds a list; wanted lines of `key: value`"),
    ],
)
def test_a_wrong_config_file_is_one_sentence(tmp_path: Path, text: str, wanted: str) -> None:
    path = tmp_path / "build.yaml"
    path.write_text(text)
    with pytest.raises(PlanError, match=wanted) as caught:
        load_settings({}, path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_config_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="absent.yaml cannot be read: No such file"):
        load_settings({}, tmp_path / "absent.yaml")


def test_a_wrong_flag_is_refused_as_a_key_is() -> None:
    with pytest.raises(PlanError, match="^tp=0 is out of range"):
        load_settings({"tp": 0})


@pytest.mark.parametrize("original", [None, 2048])
def test_a_yarn_that_reaches_further_says_what_to_write(
    tmp_path: Path, original: int | None
) -> None:
    yarn: dict[str, Any] = {"type": "yarn", "factor": 4.0}
    yarn |= {"original_max_position_embeddings": original} if original else {}
    path = write_tiny_checkpoint(tmp_path / "m", rope_scaling=yarn)
    settings = load_settings({"max_seq_len": 8192})
    wanted = (
        "at most 2048, or write max_position_embeddings=8192, .* config.json, and "
        "original_max_position_embeddings=2048 into its rope"
    )
    with pytest.raises(PlanError, match=wanted):
        make_plan(settings, open_checkpoint(path))
    config = json.loads((path / "config.json").read_text())
    longer = {**yarn, "original_max_position_embeddings": 2048}
    text = json.dumps({**config, "max_position_embeddings": 8192, "rope_scaling": longer})
    (path / "config.json").write_text(text)
    plan = make_plan(settings, open_checkpoint(path))
    assert plan.max_seq_len == 8192
    assert plan.config.rotary_scaling == {**longer, "rope_type": "yarn"}
