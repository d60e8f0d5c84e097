"""Public checkpoints: load, compute as the plain model does, tune, export, and refuse what is not whole."""

import hashlib
import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fluxlib import models
from fluxlib.models import loading
from fluxlib.moe import compact, find
from fluxlib.moe.compact import LayerPlan


def exported_tensors(folder):
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_loads_the_public_format_and_computes_as_the_plain_model(
    tmp_path, public_config, tensors_of, write, plain, input_ids, kind, num_shards
):
    tensors = tensors_of(public_config)
    folder = write(tmp_path / "public", public_config, tensors, kind, num_shards)
    model, tokenizer = models.load(folder, dtype=torch.float64)
    assert not model.training and model.dtype == torch.float64
    assert tokenizer.padding_side == "right" and tokenizer.pad_token_id == tokenizer.eos_token_id
    with torch.no_grad():
        expected = plain(public_config, tensors)(input_ids).logits
        torch.testing.assert_close(model(input_ids).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("llama_moe", {"gate_network": "linear", "score_scale_factor": 8.0}),
        ("llama_moe", {"size_experts": None}),
        ("deepseek", {"norm_topk_prob": True}),
        ("deepseek", {"first_k_dense_replace": 2}),
        ("llama_moe", {"attention_bias": True}),
        ("deepseek", {"attention_bias": True}),
    ],
)
def test_variants_of_the_configuration(tmp_path, tensors_of, write, plain, input_ids, configs, kind, change):
    config = configs[kind] | change
    tensors = tensors_of(config)
    model, _ = models.load(write(tmp_path / "public", config, tensors), dtype=torch.float64)
    with torch.no_grad():
        expected = plain(config, tensors)(input_ids).logits
        torch.testing.assert_close(model(input_ids).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_export_changes_only_the_tuned_expert(tmp_path, public_config, tensors_of, write, input_ids, kind):
    tensors = tensors_of(public_config)
    folder = write(tmp_path / "public", public_config, tensors, kind)
    model, tokenizer = models.load(folder)
    plans = [LayerPlan((), (tuple(range(6)),)) for _ in find.layers(model)]
    plans[-1] = LayerPlan((4,), ((0, 1), (2, 3, 5)))
    compact.customize(model, plans)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad and p.numel()], lr=1.0)
    model(input_ids, labels=input_ids).loss.backward()
    optimizer.step()
    compact.restore(model)
    out = models.export(model, tmp_path / "out", tokenizer, dtype=torch.bfloat16, max_shard_bytes=40_000)
    assert (out / "model.safetensors.index.json").is_file()
    written = exported_tensors(out)
    assert written.keys() == tensors.keys()
    changed = {key for key in tensors if not torch.equal(written[key], tensors[key])}
    names = (
        [f"model.layers.2.mlp.calculator.experts.weight_{m}.4" for m in ("gate", "up", "down")]
        if public_config["model_type"] == "llama_moe"
        else [f"model.layers.2.mlp.experts.4.{m}_proj.weight" for m in ("gate", "up", "down")]
    )
    assert changed == set(names)
    reloaded, _ = models.load(out, dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], tensor.to(torch.bfloat16)), name


def test_exported_config_is_what_the_models_own_code_reads(tmp_path, public_config, tensors_of, write):
    folder = write(tmp_path / "public", public_config, tensors_of(public_config))
    model, _ = models.load(folder, dtype=torch.bfloat16)
    fields = json.loads((models.export(model, tmp_path / "out") / "config.json").read_text())
    for name, value in public_config.items():
        if name not in ("transformers_version", "auto_map"):
            assert fields[name] == value, name
    assert fields["rope_theta"] == 10000


ROPES = [
    {"type": "linear", "factor": 2},
    {"type": "dynamic", "factor": 2.0},
    {"type": "yarn", "factor": 4.0, "beta_fast": 16.0, "original_max_position_embeddings": 16},
    {
        "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
]  # fmt: skip


@pytest.mark.parametrize("rope", ROPES, ids=[rope["type"] for rope in ROPES])
def test_every_kind_of_rope_comes_back_from_an_export(tmp_path, public_config, tensors_of, write, input_ids, rope):
    config = public_config | {"rope_scaling": rope, "rope_theta": 500.0}
    model, tokenizer = models.load(write(tmp_path / "public", config, tensors_of(config)))
    out = models.export(model, tmp_path / "out", tokenizer)
    fields = json.loads((out / "config.json").read_text())
    assert fields["rope_theta"] == 500.0 and fields["rope_scaling"] == rope
    assert type(fields["rope_scaling"]["factor"]) is float, "the original refuses a whole number"
    again, _ = models.load(out)
    with torch.no_grad():
        assert torch.equal(again(input_ids).logits, model(input_ids).logits)
    model.config.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (saved["rope_theta"], saved["rope_scaling"]) == (500.0, rope)
    assert type(model.config).from_pretrained(tmp_path / "saved").rope_parameters == again.config.rope_parameters


def test_an_exported_tokenizer_names_a_class_that_older_transformers_know(tmp_path, public_config, tensors_of, write):
    model, tokenizer = models.load(write(tmp_path / "public", public_config, tensors_of(public_config)))
    tokenizer.add_special_tokens({"additional_special_tokens": ["w7"]})
    out = models.export(model, tmp_path / "out", tokenizer)
    fields = json.loads((out / "tokenizer_config.json").read_text())
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert fields["additional_special_tokens"] == ["w7"] and "extra_special_tokens" not in fields
    again = models.load_tokenizer(out)
    assert again("w7").input_ids == tokenizer("w7").input_ids == [7]
    assert "w7" in again.all_special_tokens


def test_the_tokenizer_is_checked_before_weights(tmp_path, monkeypatch, public_config, tensors_of, write):
    folder = write(tmp_path / "public", public_config, tensors_of(public_config), num_shards=1)
    (folder / "model.safetensors").write_bytes(b"not read")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(OSError, match="has no tokenizer that can be read"):
        models.load(folder)
    (folder / "tokenizer.model").write_bytes(b"")
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OSError, match=r"takes the package sentencepiece, which is not installed"):
        models.load(folder)


@pytest.mark.parametrize(("kind", "field"), [("deepseek", "norm_topk_prob"), ("llama_moe", "gate_add_noise")])
def test_a_field_of_another_type_is_named(tmp_path, configs, tensors_of, write, kind, field):
    folder = write(tmp_path / "public", configs[kind] | {field: "no"}, tensors_of(configs[kind]))
    for ask_for in (models.config, models.load):
        with pytest.raises(ValueError, match=rf"config\.json cannot be used: .*field '{field}'"):
            ask_for(folder)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"type": "ntk", "factor": 2.0}, "rope_type must be one of .*'ntk'"),
        ({"type": "linear"}, "linear.*factor"),
        ("linear", r"config\.json cannot be used"),
    ],
)
def test_a_rope_that_is_none_is_named(tmp_path, public_config, tensors_of, write, rope, message):
    with pytest.raises(ValueError, match=message):
        models.load(write(tmp_path / "public", public_config | {"rope_scaling": rope}, tensors_of(public_config)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_names_weights_that_are_no_numbers(tmp_path, public_config, tensors_of, write, kind, value):
    tensors = tensors_of(public_config)
    tensors[victim(public_config)][2, 3] = value
    with pytest.raises(ValueError, match=rf"NaN or infinite: {victim(public_config)}$"):
        models.load(write(tmp_path / "public", public_config, tensors, kind))


def test_names_weights_of_eight_bits(tmp_path, public_config, tensors_of, write):
    tensors = tensors_of(public_config)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"numbers of 16 bit or more: model\.norm\.weight is F8_E4M3"):
        models.load(write(tmp_path / "public", public_config, tensors))


def test_names_a_file_that_is_not_what_the_hub_sent(tmp_path, public_config, tensors_of, write):
    folder = write(tmp_path / "snapshot", public_config, tensors_of(public_config), num_shards=1)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    blob = tmp_path / "blobs" / hashlib.sha256(content).hexdigest()
    blob.parent.mkdir()
    file.rename(blob)
    file.symlink_to(blob)
    models.load(folder)
    blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(OSError, match=r"model\.safetensors is corrupted: its SHA-256 is not the hub's"):
        models.load(folder)


def test_names_stored_frequencies_of_another_rope(tmp_path, configs, tensors_of, write):
    config = configs["llama_moe"]
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    own = 1 / 10000 ** (torch.arange(0, 8, 2) / 8)
    models.load(write(tmp_path / "rounded", config, tensors_of(config) | {key: own.bfloat16()}))
    folder = write(tmp_path / "other", config, tensors_of(config) | {key: 1 / 500 ** (torch.arange(0, 8, 2) / 8)})
    with pytest.raises(ValueError, match=rf"not the frequencies of rope_theta: {key}"):
        models.load(folder)


@pytest.mark.parametrize(("dtype", "fits"), [(torch.float64, False), (torch.bfloat16, False), (torch.float32, True)])
def test_experts_that_grouped_products_do_not_take_are_computed_one_by_one(
    tmp_path, configs, tensors_of, write, input_ids, caplog, dtype, fits
):
    config = configs["deepseek"] | {"moe_intermediate_size": 4, "n_shared_experts": None}
    tensors = {key: tensor for key, tensor in tensors_of(config).items() if "shared" not in key}
    for key in [key for key in tensors if ".experts." in key]:
        tensors[key] = (tensors[key][:, :4] if "down" in key else tensors[key][:4]).contiguous()
    model, _ = models.load(write(tmp_path / "public", config, tensors), dtype=dtype)
    assert torch.isfinite(model(input_ids).logits).all()
    assert ("no grouped products of experts" in caplog.text) is not fits
    assert model.config._experts_implementation == ("grouped_mm" if fits else "eager")


def test_old_rotary_buffers_and_absent_noise_are_tolerated(tmp_path, public_config, tensors_of, write):
    tensors = {key: t for key, t in tensors_of(public_config).items() if "weight_noise" not in key}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = 1 / 10000 ** (torch.arange(0, 8, 2) / 8)
    model, _ = models.load(write(tmp_path / "public", public_config, tensors))
    for name, parameter in model.named_parameters():
        if "weight_noise" in name:
            assert not parameter.any()


def victim(config):
    llama = config["model_type"] == "llama_moe"
    return f"model.layers.1.mlp.{'calculator.experts.weight_up.3' if llama else 'experts.3.up_proj.weight'}"


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_names_a_missing_key(tmp_path, public_config, tensors_of, write, kind):
    tensors = tensors_of(public_config)
    del tensors[victim(public_config)]
    with pytest.raises(ValueError, match=rf"missing keys: {victim(public_config)}"):
        models.load(write(tmp_path / "public", public_config, tensors, kind))


def test_names_an_extra_key(tmp_path, public_config, tensors_of, write):
    tensors = tensors_of(public_config) | {"model.layers.9.mlp.surprise": torch.ones(1)}
    with pytest.raises(ValueError, match=r"extra keys: model\.layers\.9\.mlp\.surprise"):
        models.load(write(tmp_path / "public", public_config, tensors))


def test_names_a_misshapen_key(tmp_path, public_config, tensors_of, write):
    tensors = tensors_of(public_config) | {victim(public_config): torch.ones(7, 32)}
    with pytest.raises(ValueError, match=rf"{victim(public_config)} is \[7, 32\] instead of \[8, 32\]"):
        models.load(write(tmp_path / "public", public_config, tensors))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_names_a_missing_shard(tmp_path, public_config, tensors_of, write, kind):
    folder = write(tmp_path / "public", public_config, tensors_of(public_config), kind)
    shard = next(folder.glob("*00002-of*"))
    shard.unlink()
    with pytest.raises(OSError, match=rf"lacks 1 of the 3 shards .*{shard.name}"):
        models.load(folder)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_names_a_file_cut_short(tmp_path, public_config, tensors_of, write, kind):
    folder = write(tmp_path / "public", public_config, tensors_of(public_config), kind)
    shard = next(folder.glob("*00003-of*"))
    shard.write_bytes(shard.read_bytes()[:-2000])
    with pytest.raises(OSError, match=rf"{shard.name} cannot be read"):
        models.load(folder)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ('{"weight_map": ["a"]}', "is not a readable weight index: weight_map is ['a'], allowed is dict"),
        ('{"weight_map": {"x": null}}', "is not a readable weight index"),
        ("{}", "is not a readable weight index: it lacks 'weight_map'"),
        ('{"weight_map": {"x": "../other/model.safetensors"}}', "names files outside its folder: ../other/model"),
        ('{"weight_map": {"x": "/etc/passwd"}}', "names files outside its folder: /etc/passwd"),
    ],
)
def test_names_an_index_that_is_none(tmp_path, public_config, tensors_of, write, index, said):
    folder = write(tmp_path / "public", public_config, tensors_of(public_config))
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(OSError, match=re.escape(f"{folder / 'model.safetensors.index.json'} {said}")):
        models.load(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors.index.json", "checksums.json"]
)
@pytest.mark.parametrize("content", ["[]", "null", "text", '"text"', "{", "[" * 100_000, ""])
def test_names_a_file_that_holds_no_object(tmp_path, public_config, tensors_of, write, name, content):
    folder = write(tmp_path / "public", public_config, tensors_of(public_config))
    (folder / name).write_text(content)
    with pytest.raises(OSError, match=re.escape(f"{folder / name} holds no JSON object, fetch it again")):
        models.load(folder)


@pytest.mark.parametrize("content", ["[]", "null", "{}", "{"])
def test_names_a_folder_whose_tokenizer_cannot_be_read(tmp_path, public_config, tensors_of, write, content):
    folder = write(tmp_path / "public", public_config, tensors_of(public_config))
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(OSError, match="public has no tokenizer that can be read"):
        models.load(folder)


def test_names_a_tensor_in_two_files(tmp_path, public_config, tensors_of, write):
    folder = write(tmp_path / "public", public_config, tensors_of(public_config))
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    tensors, twice = load_file(second), next(iter(load_file(first)))
    save_file(tensors | {twice: load_file(first)[twice] + 1}, second, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"stored twice: {twice} in {first.name} and {second.name}"):
        models.load(folder)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_names_weights_of_whole_numbers(tmp_path, public_config, tensors_of, write, kind):
    tensors = tensors_of(public_config) | {"model.norm.weight": torch.ones(32, dtype=torch.int32)}
    with pytest.raises(
        ValueError, match=r"no floating-point numbers of 16 bit or more: model\.norm\.weight is (I32|torch\.int32)"
    ):
        models.load(write(tmp_path / "public", public_config, tensors, kind))


def test_reads_a_bin_file_of_before_archives(tmp_path, public_config, tensors_of, write, input_ids):
    tensors = tensors_of(public_config)
    expected, _ = models.load(write(tmp_path / "new", public_config, tensors))
    folder = write(tmp_path / "old", public_config, tensors, "bin", 1)
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    model, _ = models.load(folder)
    assert torch.equal(model(input_ids).logits, expected(input_ids).logits)
    torch.save({"x": Payload()}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(OSError, match="cannot be read as a file of plain tensors"):
        models.load(folder)


def test_names_a_changed_file_where_sums_were_written(tmp_path, public_config, tensors_of, write):
    folder = write(tmp_path / "public", public_config, tensors_of(public_config), num_shards=1)
    models.write_checksums(folder)
    models.load(folder)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(OSError, match=r"model\.safetensors is corrupted"):
        models.load(folder)


class Payload:
    def __reduce__(self):
        return print, ("unpickled",)


def test_refuses_a_bin_file_that_is_more_than_tensors(tmp_path, public_config, tensors_of, write, capsys):
    folder = write(tmp_path / "public", public_config, tensors_of(public_config), "bin", 1)
    torch.save({"model.norm.weight": Payload()}, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"pytorch_model\.bin cannot be read as a file of plain tensors"):
        models.load(folder)
    assert "unpickled" not in capsys.readouterr().out


def test_refuses_to_export_over_weights_or_with_foreign_experts(tmp_path, public_config, tensors_of, write):
    folder = write(tmp_path / "public", public_config, tensors_of(public_config))
    model, _ = models.load(folder)
    with pytest.raises(ValueError, match="holds model weights already"):
        models.export(model, folder)
    model.model.layers[1].mlp.experts = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="put the original experts back first"):
        models.export(model, tmp_path / "out")


def test_unknown_names_list_the_known_ones(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OSError, match=r"mini-llama-moe.*deepseek-moe-16b"):
        models.load("no/such/model/at/all")
    monkeypatch.setenv("FLUXLIB_DATA", str(tmp_path))
    with pytest.raises(OSError, match=r"mini-llama-moe.*FLUXLIB_DATA"):
        models.load("mini-llama-moe")
    with pytest.raises(OSError, match=r"has no config\.json"):
        models.load(tmp_path)


def test_what_can_be_no_hub_id_is_refused_without_asking_the_hub(monkeypatch):
    def ask(*_, **__):
        raise AssertionError("asked")

    monkeypatch.setattr(loading, "_is_offline", ask)
    for ask_for in (models.config, models.load):
        for name in ("llama-moe-3.5", "./missing", "a/b/c", "/no/where"):
            with pytest.raises(OSError, match=f"{name!r} is no folder, no known name .* and no hub id"):
                ask_for(name)
    with pytest.raises(OSError, match=r"did you mean deepseek-moe-16b\?"):
        models.config("deepseek-moe")


def test_without_an_address_of_the_hub_only_the_cache_is_asked(monkeypatch):
    monkeypatch.setattr(loading.urllib.request, "getproxies", dict)
    monkeypatch.setattr(loading.socket, "getaddrinfo", lambda *_: (_ for _ in ()).throw(OSError("no such name")))
    for ask_for in (models.config, models.load):
        with pytest.raises(OSError, match=r"'nobody/nothing' .* the hub cannot be reached, and it is not in the cache"):
            ask_for("nobody/nothing")


def test_mini_models_come_from_the_data_folder(monkeypatch, tmp_path, public_config, tensors_of, write):
    monkeypatch.setenv("FLUXLIB_DATA", str(tmp_path))
    write(tmp_path / "models" / "mini-llama-moe", public_config, tensors_of(public_config))
    model, _ = models.load("mini-llama-moe")
    assert model.config.model_type == public_config["model_type"]
    assert models.config("mini-llama-moe").hidden_size == 32


def test_public_configurations_need_no_network():
    parameters = {"llama-moe-3.5b": 6.74, "llama-moe-3.5b-2-8": 6.74, "deepseek-moe-16b": 16.38}
    for name, billions in parameters.items():
        with torch.device("meta"):
            model = models.LlamaMoeForCausalLM if "llama" in name else models.DeepseekMoeForCausalLM
            count = sum(p.numel() for p in model(models.config(name)).parameters())
        assert count / 1e9 == pytest.approx(billions, abs=0.005)
    assert models.config("llama-moe/LLaMA-MoE-v1-3_0B-2_16").score_scale_factor == 8.0


def test_a_model_of_transformers_loads_too(tmp_path, write, input_ids):
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(
        vocab_size=48, hidden_size=32, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4,
        num_experts=4, num_experts_per_tok=2, eos_token_id=2,
    )  # fmt: skip
    original = OlmoeForCausalLM(config).eval()
    write(tmp_path, {}, {"x": torch.ones(1)}, num_shards=1)
    (tmp_path / "model.safetensors").unlink()
    original.save_pretrained(tmp_path)
    model, _ = models.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(input_ids).logits, original(input_ids).logits)
    out = models.export(model, tmp_path / "out", dtype=torch.bfloat16)
    with safe_open(out / "model.safetensors", "pt") as opened:
        assert opened.get_tensor("model.layers.0.mlp.experts.1.up_proj.weight").dtype == torch.bfloat16
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.gate.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing keys: model\.layers\.1\.mlp\.gate\.weight"):
        models.load(tmp_path)
