"""Exported Llamas, Qwens and Mistrals are plain folders of transformers: equal logits and no warning."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from support.chat_tokenizers import CHATML, LLAMA3, MISTRAL, chat_tokenizer
from support.drawn import CODEC
from support.paths import DATA, ROOT
from support.small_datasets import make_record, write_dataset
from support.stages import VISION, stage
from support.tokenizing import content, picture, run_here
from unitoken.codec.config import CodecConfig
from unitoken.codec.conversations import Conversation, Turn
from unitoken.codec.sequence import assemble
from unitoken.codec.text import TextEncoder
from unitoken.codec.tokenizer_vocabulary import tokenizer_vocabulary
from unitoken.common.errors import ConfigError
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.tokenize.config import TokenizeConfig
from unitoken.tokenize.merge import merge
from unitoken.train.__main__ import app
from unitoken.train.check import check_stage
from unitoken.train.checkpoint.compatibility import read_complete_metadata
from unitoken.train.checkpoint.layouts import model_configs, read_decoder, read_vision
from unitoken.train.checkpoint.loading import find_weights
from unitoken.train.checkpoint.metadata import read_metadata, read_stage
from unitoken.train.checkpoint.tensors import open_vision_folder
from unitoken.train.config import DecoderConfig, ModelConfig, StageConfig
from unitoken.train.export.config import FORMAT_VERSION, check_exportable, prepare_tokenizer
from unitoken.train.export.model import export_model
from unitoken.train.export.model_card import model_card
from unitoken.train.generation.engine import load_model
from unitoken.train.model.unitoken import UniToken, build_model
from unitoken.train.stage import run_stage

ROWS = 640  # of the embedding: more than the vocabulary has tokens
SIZES: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"head_dim": 12}),
    "llama_tied": ("llama", {"tie_word_embeddings": True, "rope_scaling": SCALING, "rope_theta": 5e5}),
    "llama_yarn": ("llama", {"rope_scaling": YARN, "max_position_embeddings": 128}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 8}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
}
CLASSES = {"llama": "Llama", "mistral": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
IDS = torch.randint(0, 400, (2, 80), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, and 24 samples in the layout of its chat template."""
    folder = tmp_path_factory.mktemp("families")
    chat_tokenizer(CHATML).save_pretrained(folder / "tokenizer")
    vocabulary = vocabulary_of(folder)
    records = [make_record(f"q{n}", vocabulary, 8 + n % 5, question_images=n % 3) for n in range(16)]
    records += [make_record(f"a{n}", vocabulary, 6, answer_images=1) for n in range(8)]
    write_dataset(folder / "data", records, vocabulary)
    return folder


def vocabulary_of(folder: Path) -> Vocabulary:
    from transformers import AutoTokenizer

    from unitoken.codec.image_tokenizer.files import find_image_tokenizer

    codes = find_image_tokenizer(codec(folder).vision).codebook_size
    return tokenizer_vocabulary(AutoTokenizer.from_pretrained(folder / "tokenizer"), codes, "chat_template")


def codec(folder: Path) -> CodecConfig:
    return CodecConfig.model_validate({**CODEC, "tokenizer": str(folder / "tokenizer")})


def save_theirs(folder: Path, name: str) -> None:
    """Save a model of transformers with random weights, of which none is 0 or 1."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, settings = FAMILIES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **settings}))
    for parameter_name, parameter in model.named_parameters():
        mean, deviation = (0.8, 0.3) if "norm" in parameter_name else (0.0, 0.2)
        torch.nn.init.normal_(parameter, mean, deviation)
    model.save_pretrained(folder)


def two_stages(folder: Path, name: str) -> StageConfig:
    """Train the tower on a model of transformers, and then all of it."""
    save_theirs(folder / name, name)
    tied = bool(FAMILIES[name][1].get("tie_word_embeddings"))
    common: dict[str, Any] = {
        "model": {"decoder": str(folder / name), "vision": VISION},
        "codec": codec(folder).model_dump(),
        "max_duration": "2ba",
    }
    overrides = ["data.packed_length=128", "save.interval=10ba"]
    first = stage(
        folder,
        *overrides,
        f"save.folder={folder}/{name}-1",
        **{**common, "name": "one", "trainable": ["vit", "adapter"]},
    )
    run_stage(first, check_stage(first, 1))
    parts = ["vit", "adapter", "model", *([] if tied else ["lm_head"])]
    second = stage(
        folder,
        *overrides,
        f"save.folder={folder}/{name}-2",
        f"init_from={folder}/{name}-1",
        f"save.export={folder}/{name}-export",
        **{**common, "name": "two", "trainable": parts},
    )
    run_stage(second, check_stage(second, 1))
    return second


class Exported:
    """An exported model, and the stage that made it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name, self.stage = name, two_stages(folder, name)
        self.folder = folder / f"{name}-fp32"
        export_model(str(folder / f"{name}-2"), self.folder, "fp32")
        self.model = load_model(self.stage.model, folder / f"{name}-2")


@pytest.fixture(scope="module")
def exported(folder: Path) -> Callable[[str], Exported]:
    made: dict[str, Exported] = {}

    def make(name: str) -> Exported:
        if name not in made:
            made[name] = Exported(folder, name)
        return made[name]

    return make


@pytest.fixture
def no_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail if transformers logs a warning."""
    from transformers.utils import logging as theirs

    theirs.enable_propagation()
    caplog.set_level(logging.WARNING)
    yield
    theirs.disable_propagation()
    records = caplog.get_records("call")
    assert [record.getMessage() for record in records if record.name.startswith("transformers")] == []


@torch.no_grad()
def logits(model: UniToken) -> Tensor:
    positions = torch.arange(IDS.shape[1]).expand(2, -1)
    return torch.nn.functional.linear(
        model.model(model.model.embed_tokens(IDS), positions, None), model.output_weight
    )


@pytest.mark.filterwarnings("ignore:::composer", "ignore:::torch", "ignore:::streaming")
@pytest.mark.parametrize("name", FAMILIES)
def test_two_stages_and_an_export_give_equal_logits(
    name: str, exported: Callable[[str], Exported], no_log: None
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = exported(name)
    tokenizer = AutoTokenizer.from_pretrained(made.folder)
    theirs, report = AutoModelForCausalLM.from_pretrained(made.folder, output_loading_info=True)
    assert type(theirs).__name__ == f"{CLASSES[FAMILIES[name][0]]}ForCausalLM"
    assert [list(report[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")] == [[]] * 3
    with torch.no_grad():
        found = theirs.eval()(input_ids=IDS).logits
    torch.testing.assert_close(found, logits(made.model), rtol=1e-5, atol=1e-5)
    assert theirs.config.max_position_embeddings == 128
    vocabulary = read_metadata(made.folder).vocabulary
    assert vocabulary is not None
    assert theirs.generation_config.eos_token_id == vocabulary.end_of_turn
    question = [{"role": "user", "content": "Hello"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    theirs.generate(**inputs, max_new_tokens=2, do_sample=False)


def test_the_tower_lies_apart_and_is_read_from_there(exported: Callable[[str], Exported]) -> None:
    made = exported("llama_tied")
    decoder, tower = load_file(made.folder / "model.safetensors"), made.folder / "tower"
    assert {name.split(".")[0] for name in decoder} == {"model"}  # no lm_head: it is tied
    assert {name.split(".")[0] for name in load_file(tower / "model.safetensors")} == {"vit", "adapter"}
    expected = made.model.state_dict()
    for config in (
        ModelConfig(decoder=str(made.folder), vision=str(made.folder)),
        ModelConfig(decoder=str(made.folder), vision=str(tower)),
    ):
        parts = find_weights(build_model(*model_configs(config), config), config, None)
        found = {name: tensor for source in parts.values() for name, tensor in source.load().items()}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert read_vision(str(made.folder)) == read_vision(str(tower))


def test_a_damaged_tower_is_named(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    folder = shutil.copytree(exported("qwen3").folder, tmp_path / "model")
    weights = folder / "tower" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-9] ^= 1
    weights.write_bytes(content)
    for source in (folder, folder / "tower"):
        with pytest.raises(ConfigError, match=r"tower/model\.safetensors: it was changed or damaged"):
            open_vision_folder(str(source)).load()
    shutil.rmtree(folder / "tower")
    with pytest.raises(ConfigError, match=r"tower/config\.json: this file of the export is missing"):
        read_metadata(folder)


def test_an_export_is_the_start_of_another_stage(folder: Path, exported: Callable[[str], Exported]) -> None:
    """By `init_from`, and as `decoder`; its bf16 twin was written at the end of the stage."""
    made = exported("qwen2")
    for name in ("qwen2-fp32", "qwen2-export"):
        save = made.stage.save.model_copy(update={"folder": f"{folder}/new", "export": None})
        config = made.stage.model_copy(update={"save": save, "init_from": str(folder / name)})
        assert check_stage(config, 1).warnings == ()
        decoder = made.stage.model.model_copy(update={"decoder": str(folder / name)})
        check_stage(config.model_copy(update={"init_from": None, "model": decoder}), 1)
    again = folder / "again"
    export_model(str(made.folder), again, "fp32")
    for name in ("model.safetensors", "tower/model.safetensors", "tokenizer.json", "generation_config.json"):
        assert (again / name).read_bytes() == (made.folder / name).read_bytes(), name


def test_an_older_export_is_exported_anew(tmp_path: Path) -> None:
    """Its tower is among the decoder's tensors."""
    before = DATA / "before" / "model"
    old = load_file(before / "model.safetensors")
    assert any(name.startswith("vit.") for name in old)
    config = read_stage(before)
    assert config is not None
    export_model(str(before), tmp_path / "new", "fp32", config.model_copy(update={"codec": None}))
    new = load_file(tmp_path / "new/model.safetensors") | load_file(tmp_path / "new/tower/model.safetensors")
    ours = {name: tensor for name, tensor in old.items() if not name.startswith("model.vqmodel.")}
    assert new.keys() == ours.keys()
    assert all(torch.equal(new[name], tensor.float()) for name, tensor in ours.items())
    assert read_vision(str(tmp_path / "new")) == read_vision(str(before))


# --- tokenizers ---------------------------------------------------------------------------------------------


def test_the_tokenizer_holds_all_tokens_at_their_ids(
    folder: Path, exported: Callable[[str], Exported]
) -> None:
    from transformers import AutoTokenizer

    made, vocabulary = exported("qwen3"), vocabulary_of(folder)
    tokenizer, before = (AutoTokenizer.from_pretrained(path) for path in (made.folder, folder / "tokenizer"))
    assert len(vocabulary.new_ids) > 64
    assert tokenizer.convert_tokens_to_ids(vocabulary.new_names()) == [*vocabulary.new_ids]
    assert {name: tokenizer.get_vocab()[name] for name in before.get_vocab()} == before.get_vocab()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (vocabulary.bos, vocabulary.end_of_turn)
    assert tokenizer.pad_token_id is not None
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "a cat"}]
    assert tokenizer.apply_chat_template(messages) == before.apply_chat_template(messages)
    codes = len(vocabulary.image_ids)
    assert tokenizer_vocabulary(tokenizer, codes, "chat_template") == vocabulary
    turns = Turn(("Hi <eoss>",), trained=False), Turn(("a cat",), trained=True)
    conversation = Conversation("0", turns, ())
    records = [
        assemble(conversation, [], [], TextEncoder(each, vocabulary), vocabulary)
        for each in (tokenizer, before)
    ]
    assert records[0].tokens.tolist() == records[1].tokens.tolist()


WITH_EOS = "{{ eos_token }}" + CHATML  # whose turns end by another token


@pytest.mark.parametrize(
    ("template", "eos", "expected"),
    [
        (LLAMA3, "<|begin_of_text|>", ("<|eot_id|>", "<|eot_id|>")),
        (MISTRAL, "</s>", ("</s>", "</s>")),
        (WITH_EOS, "<|endoftext|>", ("<|endoftext|>", "<|im_end|>")),
    ],
)
def test_a_template_keeps_the_tokens_that_it_names(
    template: str, eos: str, expected: tuple[str, str]
) -> None:
    tokenizer = chat_tokenizer(template, eos=eos)
    before = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])
    vocabulary = tokenizer_vocabulary(tokenizer, 8, "chat_template")
    prepare_tokenizer(tokenizer, vocabulary)
    assert (tokenizer.eos_token, tokenizer.pad_token) == expected
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}]) == before


def test_chameleons_processor_ends_a_prompt_by_sep_token() -> None:
    tokenizer = chat_tokenizer(CHATML)
    vocabulary = Vocabulary.from_tokens(tokenizer.get_vocab(), 8)
    prepare_tokenizer(tokenizer, vocabulary)
    assert tokenizer.sep_token == "<reserved08706>"
    assert tokenizer.sep_token_id == tokenizer.eos_token_id == vocabulary.end_of_turn
    again = Vocabulary.from_tokens(tokenizer.get_vocab(), 8)
    assert again == vocabulary


# --- config.json and the card -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_the_sizes_come_back_from_an_export(name: str, exported: Callable[[str], Exported]) -> None:
    made = exported(name)
    sizes = read_metadata(Path(made.stage.save.folder) / "latest").sizes
    assert sizes is not None
    found = read_decoder(str(made.folder))
    assert found.max_position_embeddings == 128
    same = {"max_position_embeddings": None, "head_dim": None}
    assert found.model_copy(update=same) == sizes.decoder.model_copy(update=same)
    assert found.head_size == sizes.decoder.head_size


@pytest.mark.parametrize(
    ("switches", "problem"),
    [
        ({"tie_word_embeddings": True}, "qk_norm layer_shared and tie_word_embeddings"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, "qk_norm layer_shared and rope_scaling"),
    ],
)
def test_what_transformers_does_not_compute_is_refused(
    switches: dict[str, Any], problem: str, folder: Path
) -> None:
    """At the start of a stage, not at its end."""
    sizes = {name: SIZES[name] for name in SIZES if name != "pad_token_id"}
    decoder = {**sizes, **switches}
    with pytest.raises(ConfigError, match=f"model: a decoder with {problem} is of no family") as caught:
        check_exportable(DecoderConfig.model_validate(decoder), "model")
    assert "\n" not in str(caught.value)
    config = stage(folder, name="refused", model={"decoder": decoder, "vision": VISION}, trainable=["model"])
    config = config.model_copy(update={"save": config.save.model_copy(update={"export": f"{folder}/out"})})
    with pytest.raises(ConfigError, match=r"save\.export: a decoder with"):
        check_stage(config, 1)


def test_the_card_tells_what_the_model_is(folder: Path, exported: Callable[[str], Exported]) -> None:
    made = exported("qwen3")
    card = (made.folder / "README.md").read_text(encoding="utf-8")
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert "base_model" not in yaml.safe_load(front)  # a folder of this machine
    assert "Base model: a local folder, `qwen3`" in text
    assert "| all | 24 |" in text
    assert "packed_length: 128" in text
    assert f'unitoken generate {made.folder.name} --prompt "Draw a cat." --draw' in text
    assert "Licence" in text
    assert str(folder) not in card
    assert str(ROOT) not in card


def test_a_card_names_the_hubs_model_and_no_secret(folder: Path, exported: Callable[[str], Exported]) -> None:
    made = exported("qwen3")
    metadata = read_complete_metadata(made.folder)
    secret = "https://me:secret@host/x?sig=abc"
    streams = {secret: made.stage.data.streams["all"]}
    config = made.stage.model_copy(
        update={
            "model": made.stage.model.model_copy(update={"decoder": "Qwen/Qwen3-0.6B"}),
            "data": made.stage.data.model_copy(update={"streams": streams}),
            "init_from": f"{folder}/runs/stage1",
        }
    )
    card = model_card(metadata._replace(stage=config), {}, "mine", "bf16")
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "Qwen/Qwen3-0.6B"
    assert "Continued from: a local folder, `stage1`" in card
    assert "secret" not in card
    assert "sig=" not in card
    assert str(folder) not in card


def test_a_card_that_was_worked_on_is_not_replaced(
    exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    made = exported("qwen3")
    folder = shutil.copytree(made.folder, tmp_path / "model")
    export_model(str(made.folder), folder, "fp32")
    with (folder / "README.md").open("a") as file:
        file.write("license: mine\n")
    read_metadata(folder)
    with pytest.raises(ConfigError, match=r"holds README\.md besides the exported model"):
        export_model(str(made.folder), folder, "fp32")


# --- the folder in use --------------------------------------------------------------------------------------


def test_the_exported_tokenizer_makes_the_same_data(
    folder: Path, exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    picture(tmp_path / "0.png", 0)
    question = [{"from": "human", "value": "<|image|>What is it?"}, {"from": "gpt", "value": "a <cat>"}]
    items = [{"conversations": question, "image": ["0.png"]}] * 3
    (tmp_path / "items.json").write_text(json.dumps(items))
    made: list[dict[str, str]] = []
    for tokenizer in (folder / "tokenizer", exported("qwen3").folder):
        fields = {"tokenizer": str(tokenizer), "vision": CODEC["vision"], "target_size": 16}
        config = TokenizeConfig.model_validate({**fields, "layout": "chat_template"})
        out = tmp_path / f"data{len(made)}"
        run_here(config, tmp_path / "items.json", out)
        merge(str(out))
        made.append({name: hash for name, hash in content(out).items() if name != "settings.yaml"})
    assert made[0]["vocabulary.json"] == made[1]["vocabulary.json"]
    shards = [{name: hash for name, hash in each.items() if name.endswith(".mds")} for each in made]
    assert shards[0] == shards[1]
    assert len(shards[0]) > 0


def test_the_command_generates_with_the_exported_tokenizer(
    folder: Path, exported: Callable[[str], Exported]
) -> None:
    made = exported("llama_tied")
    drawing = ["--prompt", "Draw a cat.", "--draw", "--size", "16x16", "--temperature", "0"]
    pictures = []
    for name, overrides in (("a", []), ("b", [f"codec.tokenizer={made.folder}"])):
        out = folder / f"drawn-{name}"
        result = CliRunner().invoke(
            app, ["generate", str(made.folder), *drawing, "--out", str(out), *overrides]
        )
        assert result.exit_code == 0, result.output
        pictures.append((out / "0000.png").read_bytes())
    assert pictures[0] == pictures[1]


def test_a_large_tokenizer_is_not_taken_for_mistrals(tmp_path: Path, no_log: None) -> None:
    """Transformers 4.57.6 warns of local tokenizers of over 100,000 tokens, by the version in config.json."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(100_001)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    fields = {"model_type": "llama", "transformers_version": FORMAT_VERSION}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert AutoTokenizer.from_pretrained(tmp_path)("w7 w9")["input_ids"] == [7, 9]
