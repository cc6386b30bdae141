"""Foreign checkpoints: every tensor accounted for, nothing executed, everything odd named."""

import io
import logging
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from svitt_ops.models import SViTTConfig, SViTTForPreTraining, change_image_size, convert
from svitt_ops.models.parts.released import OFFICIAL_CHECKPOINT
from svitt_ops.models.parts.unpickling import Inert, read_tensors

MakeConfig = Callable[..., SViTTConfig]

BIAS = "relative_position_bias.relative_position_bias"
NAMES = {
    "video.cls_token": "vision_encoder.embeddings.cls_token",
    "video.patches.": "vision_encoder.embeddings.patch_embeddings.projection.",
    "video.layers.": "vision_encoder.encoder.layer.",
    "add_attention.scale": "lambda_1",
    "add_mlp.scale": "lambda_2",
    "norm_before": "layernorm_before",
    "norm_after": "layernorm_after",
    "pooler_norm": "vision_encoder.pooler.layernorm",
    "video_norm": "vision_layernorm",
    "video_projection": "vision_proj",
    "text_projection": "text_proj",
    "match_head": "itm_head",
    "temperature": "temp",
    "text.embeddings.norm": "text_encoder.bert.embeddings.LayerNorm",
    "text.embeddings.word": "text_encoder.bert.embeddings.word_embeddings",
    "text.embeddings.position": "text_encoder.bert.embeddings.position_embeddings",
    "text.embeddings.token_type": "text_encoder.bert.embeddings.token_type_embeddings",
    "token_head.dense": "text_encoder.cls.predictions.transform.dense",
    "token_head.norm": "text_encoder.cls.predictions.transform.LayerNorm",
    "token_head.bias": "text_encoder.cls.predictions.bias",
    "text.layers.": "text_encoder.bert.encoder.layer.",
}
IN_VIDEO = {
    "attention.bias.table": "attention.attention." + BIAS + "_table",
    "attention.query": "attention.attention.query",
    "attention.key": "attention.attention.key",
    "attention.value": "attention.attention.value",
    "attention.out": "attention.output.dense",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
}
IN_TEXT = {
    "cross_attention.out": "crossattention.output.dense",
    "cross_attention.": "crossattention.self.",
    "cross_norm": "crossattention.output.LayerNorm",
    "attention_norm": "attention.output.LayerNorm",
    ".attention.out": ".attention.output.dense",
    ".attention.query": ".attention.self.query",
    ".attention.key": ".attention.self.key",
    ".attention.value": ".attention.self.value",
    "mlp_norm": "output.LayerNorm",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
}


def official_name(name: str, fusion_layer: int) -> str:
    """The authors' name of one of our tensors, written independently of the conversion."""
    if name.startswith("fusion.layers."):
        _, _, layer, rest = name.split(".", 3)
        name = f"text.layers.{int(layer) + fusion_layer}.{rest}"
    inside = IN_VIDEO if name.startswith("video.layers") else IN_TEXT
    if ".layers." in name:
        for ours, theirs in inside.items():
            if ours in name:
                name = name.replace(ours, theirs)
                break
    for ours, theirs in NAMES.items():
        if ours in name:
            name = name.replace(ours, theirs, 1)
    return name


def official_tensors(model: SViTTForPreTraining) -> OrderedDict[str, Tensor]:
    layer = model.config.fusion_layer
    tensors = OrderedDict((official_name(k, layer), v) for k, v in model.state_dict().items())
    tensors["temp"] = tensors["temp"].reshape(())
    tensors["text_encoder.cls.predictions.decoder.weight"] = model.text.embeddings.word.weight
    tensors["text_encoder.cls.predictions.decoder.bias"] = model.token_head.bias
    tensors["text_encoder.bert.embeddings.position_ids"] = torch.arange(16)[None]
    for i in range(model.config.num_hidden_layers):
        bias = f"vision_encoder.encoder.layer.{i}.attention.attention.relative_position_bias"
        tensors[f"{bias}.relative_position_index"] = torch.zeros(65, 65, dtype=torch.int64)
    return tensors


class Attack:
    """Runs a command when it is unpickled, as any class may ask for."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call, self.args


class DictConfig(dict[str, Any]):
    """Like OmegaConf's: a class that the reader may not have, with state, items and children."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.__dict__.update(_metadata={"flags": {}}, _parent=None, _content=content)

    def __reduce_ex__(self, _: Any) -> tuple[Any, ...]:
        return DictConfig, ({},), dict(self.__dict__), None, iter(self.items())


@pytest.fixture
def source(make_config: MakeConfig) -> SViTTForPreTraining:
    torch.manual_seed(0)
    model = SViTTForPreTraining(make_config(num_frames=3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("zipped", [True, False])
def test_official_checkpoint(
    source: SViTTForPreTraining,
    make_config: MakeConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    zipped: bool,
) -> None:
    bait = tmp_path / "executed"
    content = {
        "model": official_tensors(source),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
        "config": DictConfig(
            {
                "video_input": DictConfig({"num_frames": 99}),
                "system": Attack(os.system, f"touch {bait}"),
                "open": Attack(open, str(bait), "w"),
                "eval": Attack(eval, f"open({str(bait)!r}, 'w')"),
                "nested": [Attack(Attack, Attack(os.mkdir, str(bait)))],
            }
        ),
        "attack": Attack(os.system, f"touch {bait}"),
        "epoch": 9,
    }
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with caplog.at_level(logging.WARNING):
        model = convert.load_official(path, make_config(num_frames=8))
    assert not bait.exists() and caplog.text == ""
    assert model.config.num_frames == 3
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    with suppress(FileExistsError):
        torch.load(path, weights_only=False)
    assert bait.exists()  # so the attack is a real one


def test_every_tensor_is_accounted_for(
    source: SViTTForPreTraining, make_config: MakeConfig
) -> None:
    tensors = official_tensors(source)
    tensors["temporal_embeddings"] = torch.zeros(1, 4, 1, 32)
    tensors["text_encoder.bert.encoder.layer.7.output.dense.weight"] = torch.zeros(1)
    del tensors["itm_head.weight"]
    model = SViTTForPreTraining(make_config(num_frames=3))
    found = convert.convert_into(model, tensors, OFFICIAL_CHECKPOINT)
    assert {*found.loaded, *found.dropped, *found.unknown} == set(tensors)
    assert len(found.loaded) + len(found.dropped) + len(found.unknown) == len(tensors)
    assert found.unknown == (
        "temporal_embeddings",
        "text_encoder.bert.encoder.layer.7.output.dense.weight",
    )
    assert found.missing == ("match_head.weight",)
    assert found.num_frames == 3 and len(found.dropped) == 6


def test_odd_names_are_reported(
    source: SViTTForPreTraining,
    make_config: MakeConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tensors = official_tensors(source)
    tensors["temporal_embeddings"] = torch.zeros(1, 4, 1, 32)
    del tensors["vision_layernorm.bias"]
    torch.save({"model": tensors}, tmp_path / "a.pth")
    with caplog.at_level(logging.WARNING):
        convert.load_official(tmp_path / "a.pth", make_config())
    assert "no counterpart for: temporal_embeddings" in caplog.text
    assert "nothing for: video_norm.bias" in caplog.text


def test_image_checkpoint_of_one_frame(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Singularity's: a two-dimensional table, whatever frames its configuration tells of."""
    image = SViTTForPreTraining(make_config(num_frames=1, bias_init_std=1.0))
    retrieval = {
        "module." + name.replace("text_encoder.bert.", "text_encoder."): value
        for name, value in official_tensors(image).items()
        if ".cls." not in name
    }
    torch.save({"model": retrieval, "config": {"video_input": {"num_frames": 4}}}, tmp_path / "a")
    model = convert.load_official(tmp_path / "a", make_config(num_frames=4))
    assert model.config.num_frames == 1
    assert "nothing for: token_head.bias, token_head.dense" in caplog.text
    table = "video.layers.0.attention.bias.table"
    assert torch.equal(model.state_dict()[table], image.state_dict()[table])


def test_wrong_checkpoints(
    source: SViTTForPreTraining, make_config: MakeConfig, tmp_path: Path
) -> None:
    path = tmp_path / "a.pth"

    def load(content: object) -> SViTTForPreTraining:
        torch.save(content, path)
        return convert.load_official(path, make_config())

    with pytest.raises(FileNotFoundError, match="path must be a file"):
        convert.load_official(tmp_path / "none.pth", make_config())
    with pytest.raises(ValueError, match=r"must have a relative position bias table, got .*lstm"):
        load({"lstm": torch.zeros(3)})
    with pytest.raises(ValueError, match="must hold a mapping, got Tensor"):
        load(torch.zeros(3))
    with pytest.raises(ValueError, match="must hold tensors by name, got none"):
        load({"epoch": 3})
    tensors = official_tensors(source)
    tensors["temp"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"temp must have shape \(\), got \(2,\)"):
        load(tensors)
    tensors = official_tensors(source)
    tensors["text_encoder.embeddings.LayerNorm.bias"] = torch.zeros(24)
    with pytest.raises(ValueError, match=r"text_encoder\.embeddings.* must be the only one"):
        load(tensors)
    for junk in (b"", b"junk", b"\x80\x02", zip_of("x", b""), path.read_bytes()[:-400]):
        path.write_bytes(junk)
        with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
            read_tensors(path)


def zip_of(name: str, content: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr(name, content)
    return file.getvalue()


def test_programs_are_refused(tmp_path: Path) -> None:
    script = torch.jit.script(torch.nn.Linear(2, 2))
    script.save(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="must hold weights, got a TorchScript program"):
        read_tensors(tmp_path / "a.pt")


def test_pickles_cannot_reach_what_tensors_are_made_of(tmp_path: Path) -> None:
    """Opcodes that set attributes of a function, call a method, or build from a name."""
    rebuild = torch._utils._rebuild_tensor_v2
    before = dict(vars(rebuild)), rebuild.__defaults__
    bait = tmp_path / "executed"
    streams = [
        b"ctorch._utils\n_rebuild_tensor_v2\n(}Vx\nI1\ns}V__defaults__\n(I1\ntstub.",
        b"cbuiltins\ngetattr\n(cos\nsystem\nV__call__\ntR(Vtouch " + str(bait).encode() + b"\ntR.",
        b"(Vtouch " + str(bait).encode() + b"\nios\nsystem\n.",
        b"(cos\nsystem\nVtouch " + str(bait).encode() + b"\no.",
        b"ctorch.storage\n_load_from_bytes\n(Vx\ntR.",
        b"ccopyreg\n_reconstructor\n(cos\nsystem\ncbuiltins\nobject\nNtR.",
    ]
    from svitt_ops.models.parts.unpickling import _load

    for stream in streams:
        try:
            found = _load(io.BytesIO(stream))
        except (TypeError, pickle.UnpicklingError, IndexError):
            continue
        assert isinstance(found, Inert) or "Guarded" in type(found).__name__
    assert not bait.exists()
    assert (dict(vars(rebuild)), rebuild.__defaults__) == before


JPEG = b"\xff\xd8\xff\xe0\x00\x10JFIF\x00" + bytes(64)
HTML = b"<!DOCTYPE html>\n<html><body>404: not found</body></html>\n" * 9


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        JPEG,
        HTML,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f" + b"K\x00.",  # a frame of 2^63
        b"\x80\x02]r\xff\xff\xff\x7f.",  # a place of 2^31 in the memo
        b"\x80\x02" + b"(" * 100_000 + b".",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x3f.",  # bytes without end
        zip_of("archive/data.pkl", b"(" * 9),
        b"PK\x03\x04" + bytes(99),
    ],
)
def test_what_is_no_checkpoint_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint") as caught:
        read_tensors(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 300 + len(str(path))


def test_archives_that_unpack_to_more_than_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"model": {"a": torch.zeros(1 << 20)}}, path)
    assert read_tensors(path)["a"].numel() == 1 << 20
    with (
        zipfile.ZipFile(path) as archive,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in archive.namelist():
            packed.writestr(entry, archive.read(entry))
    assert (tmp_path / "bomb.pth").stat().st_size < 1 << 16
    with pytest.raises(ValueError, match=r"does not compress, got \d+ bytes packed into"):
        read_tensors(tmp_path / "bomb.pth")
    torch.save({"model": {"a": torch.zeros(1).expand(1 << 20, 1 << 20)}}, path)
    with pytest.raises(ValueError, match=r"a in .* must be as large .* got shape \(1048576, 1048"):
        read_tensors(path)


@pytest.mark.parametrize("name", ["temporal_encoder.layer.0", "temporal_vision_encoder.layer.1"])
def test_layers_over_time_are_another_model(
    source: SViTTForPreTraining, make_config: MakeConfig, tmp_path: Path, name: str
) -> None:
    tensors = official_tensors(source)
    tensors["temporal_embeddings"] = torch.ones(1, 4, 1, 32)
    for part in ("attention.self.query.weight", "output.dense.weight"):
        tensors[f"{name}.{part}"] = torch.ones(32, 32)
    torch.save({"model": tensors}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="without layers over time, got 2 tensors") as caught:
        convert.load_official(tmp_path / "a.pth", make_config())
    assert "\n" not in str(caught.value) and f"{name}.attention" in str(caught.value)


def test_missing_heads_are_said_and_not_ranked_by(
    source: SViTTForPreTraining,
    make_config: MakeConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tensors = official_tensors(source)
    for name in [name for name in tensors if name.startswith(("itm_head", "text_proj"))]:
        del tensors[name]
    tensors |= {f"text_decoder.bert.layer.{k}.weight": torch.zeros(1) for k in range(40)}
    torch.save({"model": tensors}, tmp_path / "a.pth")
    with caplog.at_level(logging.WARNING):
        model = convert.load_official(tmp_path / "a.pth", make_config())
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3 and not any("\n" in line or len(line) > 600 for line in lines)
    assert "no counterpart for: text_decoder.bert.layer.0.weight" in lines[0]
    assert "and 34 more; the model computes without" in lines[0]
    found = {line.split("; ")[-1] for line in lines[1:]}
    assert found == {
        "the match head starts from random or initial weights",
        "the embeddings of texts start from random or initial weights",
    }
    assert model.config.loss_weights == {"vtc": 1, "vtm": 0, "mlm": 1}


def test_a_file_of_which_nearly_nothing_fits(
    source: SViTTForPreTraining, make_config: MakeConfig, tmp_path: Path
) -> None:
    tensors = {k: v for k, v in official_tensors(source).items() if "vision_encoder" in k}
    torch.save(tensors, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="must hold the weights of such a model, got 59 of its"):
        convert.load_official(tmp_path / "a.pth", make_config())


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("hidden_size", 64, 32),
        ("patch_size", 16, 8),
        ("num_attention_heads", 4, 2),
        ("num_hidden_layers", 4, 3),
        ("num_hidden_layers", 2, 3),
        ("intermediate_size", 64, 48),
        ("vocab_size", 30522, 50),
        ("text_hidden_size", 48, 24),
        ("text_num_hidden_layers", 5, 4),
        ("fusion_layer", 3, 2),
        ("text_intermediate_size", 80, 40),
        ("max_position_embeddings", 512, 16),
        ("type_vocab_size", 3, 2),
        ("projection_dim", 256, 12),
    ],
)
def test_other_sizes_than_the_configuration_s(
    source: SViTTForPreTraining,
    make_config: MakeConfig,
    tmp_path: Path,
    field: str,
    value: int,
    wanted: int,
) -> None:
    torch.save(official_tensors(source), tmp_path / "a.pth")
    config = make_config(**{field: value, "prune_layers": [0], "multimodal_prune_layers": []})
    with pytest.raises(ValueError, match=f"load_official: {field} must be {wanted}, ") as caught:
        convert.load_official(tmp_path / "a.pth", config)
    message = str(caught.value)
    assert message.endswith(f"a.pth, got {value}") and "\n" not in message


@pytest.mark.parametrize("pixels", [32, 48, 24])
def test_official_files_of_another_resolution(
    source: SViTTForPreTraining,
    make_config: MakeConfig,
    tmp_path: Path,
    pixels: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.save({"model": official_tensors(source)}, tmp_path / "a.pth")
    with caplog.at_level(logging.WARNING):
        model = convert.load_official(tmp_path / "a.pth", make_config(image_size=pixels))
    said = f"bias is interpolated from 32 to {pixels} pixels a side"
    assert (said in caplog.text) == (pixels != 32)
    assert (model.config.num_frames, model.config.image_size) == (3, pixels)
    wanted = change_image_size(source, pixels).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, wanted[name]), name


def test_the_index_beside_a_table_tells_its_frames(make_config: MakeConfig, tmp_path: Path) -> None:
    """Nine offsets of 81 rows are 5 frames of 5 x 5 patches, or one of 14 x 14."""
    torch.manual_seed(0)
    source = SViTTForPreTraining(make_config(image_size=40, num_frames=5, bias_init_std=1.0))
    tensors = official_tensors(source)
    for frames in (5, 1):
        for name in [name for name in tensors if name.endswith("relative_position_index")]:
            tokens = 126 if frames == 5 else 197
            tensors[name] = torch.zeros(tokens, tokens, dtype=torch.int64)
        torch.save(tensors, tmp_path / "a.pth")
        model = convert.load_official(tmp_path / "a.pth", make_config(image_size=48))
        assert model.config.num_frames == frames


def test_weights_that_are_not_finite(
    source: SViTTForPreTraining, make_config: MakeConfig, tmp_path: Path
) -> None:
    for value in (torch.nan, torch.inf):
        tensors = official_tensors(source)
        tensors["vision_proj.weight"] = torch.full((12, 32), value)
        torch.save(tensors, tmp_path / "a.pth")
        with pytest.raises(ValueError, match=r"vision_proj\.weight must be finite, got NaN"):
            convert.load_official(tmp_path / "a.pth", make_config())
