"""Published checkpoints become ordinary models: every file format, what is refused, and the command."""

import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from longwave import models
from longwave.cli import app
from longwave.official.importing import FORMATS, import_model
from longwave.official.mamba import MambaLMHeadModel
from longwave.official.presets import PRESETS
from longwave.official.safari_lm import H3LM
from longwave.official.transformer import GPT2

SIZES = {
    "mamba_hf": (MambaForCausalLM, MambaConfig, {"hidden_size": 16, "num_hidden_layers": 2}),
    "gpt2_hf": (GPT2LMHeadModel, GPT2Config, {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "llama_hf": (
        LlamaForCausalLM,
        LlamaConfig,
        {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32},
    ),
}


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """Models of transformers in float64 and the folders that they saved themselves to."""
    made = {}
    for name, (model, config, sizes) in SIZES.items():
        torch.manual_seed(0)
        made[name] = model(config(vocab_size=50, eos_token_id=1, bos_token_id=1, pad_token_id=1, **sizes)).double()
        made[name].save_pretrained(tmp_path_factory.mktemp(name) / "there", max_shard_size="20KB")
    return {name: (model.eval(), tmp_path_factory.getbasetemp() / f"{name}0" / "there") for name, model in made.items()}


def copied(folder, to):
    return shutil.copytree(folder, to / "copy")


@pytest.mark.parametrize("name", SIZES)
def test_a_folder_of_transformers_becomes_an_ordinary_model(name, official, tmp_path):
    theirs, folder = official[name]
    ids = torch.arange(40).reshape(2, 20) % 50
    made = import_model(folder, tmp_path / "ours")
    assert made.format == name
    model, spec = models.load(tmp_path / "ours")
    assert spec == made.spec
    with torch.no_grad():
        off = 1e-9 if name == "gpt2_hf" else 1e-6  # theirs have angles and scans in float32
        torch.testing.assert_close(model(ids)[0], theirs(ids).logits.double(), rtol=0, atol=off)
    ones = torch.ones_like(ids)
    greedy = theirs.generate(ids, attention_mask=ones, max_new_tokens=6, do_sample=False, eos_token_id=None)[:, 20:]
    assert models.generate(model, ids, 6, temperature=0) == greedy.tolist()


def test_one_weights_file_says_its_shape_alone(official, tmp_path):
    """Without a config.json the caller gives the options; a pickle of tensors is as good as safetensors."""
    theirs, folder = official["mamba_hf"]
    torch.save({"state_dict": theirs.state_dict(), "epoch": 3}, tmp_path / "weights.pt")
    made = import_model(
        tmp_path / "weights.pt", tmp_path / "a", "mamba_hf", vocab_size=50, hidden_size=16, num_hidden_layers=2
    )
    import_model(folder, tmp_path / "b")
    ours, other = models.load(tmp_path / "a")[0].state_dict(), models.load(tmp_path / "b")[0].state_dict()
    assert made.keys == len(theirs.state_dict())
    assert ours.keys() == other.keys()
    assert all(torch.equal(ours[key], other[key]) for key in ours)


def test_tensors_keep_their_dtype_and_are_mapped(official, tmp_path):
    theirs, folder = official["mamba_hf"]
    where = copied(folder, tmp_path)
    for file in where.glob("*.safetensors*"):
        file.unlink()
    save_file(
        {k: v.bfloat16() for k, v in theirs.state_dict().items() if k != "lm_head.weight"}, where / "model.safetensors"
    )
    import_model(where, tmp_path / "ours")
    assert {p.dtype for p in models.load(tmp_path / "ours")[0].parameters()} == {torch.bfloat16}


def test_a_repository_in_the_cache_of_the_hub(official, tmp_path):
    cache = tmp_path / "models--someone--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    shutil.copytree(official["gpt2_hf"][1], cache / "snapshots" / ("0" * 40))
    code = (
        "from longwave.official.importing import import_model;"
        f"print(import_model('someone/tiny', {str(tmp_path / 'ours')!r}).format);"
        f"import_model('someone/else', {str(tmp_path / 'none')!r})"
    )
    where = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": ""}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=where)
    assert run.stdout == "gpt2_hf\n", run.stderr
    assert "ValueError: there is no file someone/else, nor a repository" in run.stderr


class _Runs:
    def __reduce__(self):
        return print, ("executed",)


def test_files_that_are_refused(official, tmp_path, capsys):
    theirs, folder = official["llama_hf"]
    where = copied(folder, tmp_path)

    def refused(message, path=where, **options):
        with pytest.raises(ValueError, match=re.escape(message)):
            import_model(path, tmp_path / "ours", **options)
        assert not (tmp_path / "ours").exists()

    shards = sorted(where.glob("*-of-*.safetensors"))
    refused("it looks like llama_hf", format="gpt2_hf")
    refused("did you mean 'llama_hf'?", format="lama_hf")
    shards[0].write_bytes(shards[0].read_bytes()[:-100])
    refused(f"{shards[0]} is truncated or no safetensors file")
    shards[0].unlink()
    refused(f"names {len(shards)} files, of which there is no {shards[0].name}")
    state = theirs.state_dict()
    torch.save(state, where / "lost.pt")
    refused("is of no format that longwave recognises", tmp_path_of(tmp_path, {"w": torch.ones(2)}))
    refused("num_hidden_layers", where / "lost.pt", num_hidden_layers="two")
    refused("unexpected key 'model.layers.3.", where / "lost.pt", num_hidden_layers=3)
    refused("has shape (50, 16); the config asks for (51, 16)", where / "lost.pt", vocab_size=51)
    few = {key: t for key, t in state.items() if "layers.1." not in key or key.endswith("input_layernorm.weight")}
    torch.save(few, where / "lost.pt")
    refused("the state has no key 'model.layers.1.self_attn.q_proj.weight', ", where / "lost.pt")
    with open(tmp_path / "runs.pt", "wb") as file:
        pickle.dump({"w": _Runs()}, file, protocol=2)
    refused("needs code to be run", tmp_path / "runs.pt")
    torch.save({"w": torch.ones(2), "state": _Runs()}, tmp_path / "runs.pt")
    refused("needs code to be run", tmp_path / "runs.pt")
    (tmp_path / "runs.pt").write_bytes((tmp_path / "runs.pt").read_bytes()[:200])
    refused("is truncated or no file of torch.save", tmp_path / "runs.pt")
    refused("there is no nowhere", "nowhere")
    (tmp_path / "empty").mkdir()
    refused("has no file of weights", tmp_path / "empty")
    for name, stored, message in [
        ("empty.pt", b"", "truncated or no file of torch.save: "),
        ("page.pt", b"<html>not found", "no file of torch.save; it begins with b'<html>not found'"),
        ("pointer.pt", b"version https://git-lfs.github.com/spec/v1\n", "fetch them by git lfs pull"),
    ]:
        (tmp_path / name).write_bytes(stored)
        refused(message, tmp_path / name)
    refused("is one of several; name their folder", shards[1])
    import_model(official["gpt2_hf"][1], tmp_path / "mine")
    refused("is longwave's own: eval, generate and train --from take it as it is", tmp_path / "mine")
    (where / "config.json").write_text("{")
    refused("config.json is no JSON", where / "lost.pt")
    assert "executed" not in capsys.readouterr().out


def tmp_path_of(tmp_path, state):
    (tmp_path / "bare").mkdir(exist_ok=True)
    torch.save(state, tmp_path / "bare" / "weights.pt")
    return tmp_path / "bare"


def test_the_memory_is_one_copy(tmp_path):
    """An import of 100 MB in two files takes no second copy of them."""
    there, sizes = tmp_path / "there", {"n_embd": 512, "n_layer": 6, "n_head": 8, "vocab_size": 8000}
    there.mkdir()
    state = {key: torch.zeros(shape) for key, shape in GPT2.read(sizes).tensors().items() if key != "lm_head.weight"}
    files = {key: f"part-{i % 2}.safetensors" for i, key in enumerate(state)}
    for file in sorted(set(files.values())):
        save_file({key: state[key] for key in state if files[key] == file}, there / file)
    (there / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (there / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
    size = sum(file.stat().st_size for file in (tmp_path / "there").glob("*.safetensors"))
    code = f"""
import threading, time
from longwave.official.importing import import_model
from longwave.official.transformer import GPT2
GPT2.read({{"n_layer": 1}}).tensors()  # torch has the meta device's parts in memory after this
def anonymous():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) * 1024
begin, most, done = anonymous(), 0, False
def watch():
    global most
    while not done:
        most = max(most, anonymous()); time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
import_model({str(tmp_path / "there")!r}, {str(tmp_path / "ours")!r})
done = True; thread.join(); print(most - begin)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert int(run.stdout) < 1.2 * size, (run.stdout, size, run.stderr)


def test_the_command(official, tmp_path, capsys):
    def run(*changes):
        app(["import", str(official["gpt2_hf"][1]), "--to", str(tmp_path / "ours"), *changes], standalone_mode=False)

    run()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "format      gpt2_hf"
    assert "all used" in lines[1]
    assert "(float64)" in lines[2]
    assert "sha256" in lines[3]
    assert "GPT-2" in lines[4]
    with pytest.raises(ValueError, match="is there already"):
        run()
    with pytest.raises(ValueError, match=r"no tokenizer.json, and was trained with GPT-2's \(openai-community/gpt2\)"):
        app(["generate", str(tmp_path / "ours"), "--prompt", "a"], standalone_mode=False)
    with pytest.raises(ValueError, match="has 256 ids and the model knows 50"):
        app(
            ["import", str(official["gpt2_hf"][1]), "--to", str(tmp_path / "b"), "--tokenizer", "bytes"],
            standalone_mode=False,
        )
    assert not (tmp_path / "b").exists()
    (tmp_path / "a.fa").write_text(">a\n" + "ACGT" * 200)
    words = r"was trained with GPT-2's \(openai-community/gpt2\): copy one into it, or .*; the task dna has ids of char"
    with pytest.raises(ValueError, match=words):
        app(
            ["eval", str(tmp_path / "ours"), f"task={{kind: dna, files: [{tmp_path}/a.fa], length: 8}}"],
            standalone_mode=False,
        )
    for folder in official["gpt2_hf"][1], official["mamba_hf"][1]:  # that was not imported
        with pytest.raises(ValueError, match=r"it is of model_type '(gpt2|mamba)': longwave import makes"):
            app(["generate", str(folder), "--prompt", "a"], standalone_mode=False)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "model._orig_mod."])
def test_what_trainers_put_before_names_is_left_out(prefix, tmp_path):
    """As DDP, torch.compile and Lightning do."""
    options = {"d_model": 8, "n_layer": 2, "vocab_size": 16, "pad_vocab_size_multiple": 1, "rms_norm": True}
    state = {key: torch.randn(shape) for key, shape in MambaLMHeadModel.read(options).tensors().items()}
    state["lm_head.weight"] = state["backbone.embedding.weight"]
    torch.save({"state_dict": {prefix + key: tensor for key, tensor in state.items()}}, tmp_path / "last.ckpt")
    assert import_model(tmp_path / "last.ckpt", tmp_path / "ours").format == "mamba_ssm_lm"
    torch.save(state, tmp_path / "bare.pt")
    import_model(tmp_path / "bare.pt", tmp_path / "same")
    ours, same = models.load(tmp_path / "ours")[0].state_dict(), models.load(tmp_path / "same")[0].state_dict()
    assert all(torch.equal(ours[key], same[key]) for key in same)


def test_what_shapes_do_not_tell_is_given_by_the_caller(tmp_path):
    sizes = {"d_model": 16, "n_layer": 2, "vocab_size": 20, "attn_layer_idx": [1], "attn_cfg": {"num_heads": 2}}
    shapes = H3LM.read(sizes).tensors()
    torch.save({key: torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt as h3lm: shapes do not tell .* or give them all as key=value"):
        import_model(tmp_path / "model.pt", tmp_path / "ours")
    assert import_model(tmp_path / "model.pt", tmp_path / "ours", **sizes).format == "h3lm"
    assert models.load(tmp_path / "ours")[1].pattern[1].heads == 2


def test_the_page_names_every_format_and_family():
    page = (Path(__file__).parent.parent / "docs" / "checkpoints.md").read_text()
    assert {name for name in FORMATS if f"`{name}`" not in page} == set()
    families = {preset.hub.partition("/")[0] for preset in PRESETS.values()}
    assert {owner for owner in families if f"longwave import {owner}/" not in page} == set()


def test_every_format_has_words_for_its_tokenizer():
    assert all(source.tokenizer for sources in FORMATS.values() for source in sources)
