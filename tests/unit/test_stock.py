"""Mixing in stock's loop, as far as it can be seen without Megatron-LM: flags, names, refusals, the entry."""

from argparse import ArgumentParser, Namespace

import pytest

from megatron_dynmix.config.leaves import mixing_leaves
from megatron_dynmix.errors import InputError
from megatron_dynmix.stock import mixed, with_flags
from megatron_dynmix.stock.flags import add_mixing_flags, caps_of, mixing_of
from megatron_dynmix.stock.refusals import REFUSED, check_flags, check_sources
from megatron_dynmix.stock.sources import names_of


def parsed(text=""):
    parser = add_mixing_flags(ArgumentParser(allow_abbrev=False))
    return parser.parse_args(text.split())


def stock_args(text="", **others):
    """What Megatron-LM's parser would have, as far as it is asked."""
    known = {
        "cuda_graph_impl": "none",
        "dataloader_type": "single",
        "transformer_impl": "local",
        "micro_batch_size": 2,
        "context_parallel_size": 1,
        "tensor_model_parallel_size": 1,
        "create_attention_mask_in_dataloader": True,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
    }
    return Namespace(**{**vars(parsed(text)), **known, **others})


def test_every_setting_of_the_mixing_section_is_a_flag():
    options = {
        option for action in add_mixing_flags(ArgumentParser())._actions for option in action.option_strings
    }
    assert {f"--dynmix-{name.replace('_', '-')}" for name in mixing_leaves()} <= options


def test_flags_give_settings_as_our_own_command_reads_them(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    mixing = mixing_of(
        parsed(
            "--dynmix-strategy gate-load --dynmix-eta 1e1 --dynmix-interval 5 --no-dynmix-debias "
            "--dynmix-similarity-correction --dynmix-override-file o.json "
            '--dynmix-shadow [inverse] --dynmix-prior {"a":1,"b":2}'
        )
    )
    assert (mixing.options["eta"], mixing.options["debias"], mixing.interval) == (10.0, False, 5)
    assert mixing.similarity_correction and mixing.shadow == ("inverse",)
    assert mixing.override_file == str(tmp_path / "o.json") and mixing.prior == {"a": 1, "b": 2}
    assert mixing.signal == "train"


def test_flags_do_not_meet_those_of_a_fork_that_has_some_of_its_own():
    parser = with_flags(lambda parser: parser.add_argument("--interval") and parser)(ArgumentParser())
    args = parser.parse_args(["--interval", "3", "--dynmix-interval", "7"])
    assert (args.interval, mixing_of(args).interval) == ("3", 7)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--dynmix-signal probe", ["--dynmix-signal probe", "leave"]),
        ("--dynmix-probe-tokens 5", ["--dynmix-probe"]),
        ("--dynmix-interval 0", ["mixing.interval is 0"]),
        ("--dynmix-interval soon", ["--dynmix-interval", "soon"]),
        ("--dynmix-strategy best", ["best", "gate-load"]),
        ("--dynmix-strategy uniform --dynmix-eta 3", ["eta", "uniform"]),
    ],
)
def test_wrong_settings_are_refused_by_flag(flags, words):
    with pytest.raises(InputError) as refusal:
        mixing_of(parsed(flags))
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_flags_that_were_parsed_too_early_are_missed_aloud():
    with pytest.raises(InputError, match=r"after the flags were parsed.*below the imports"):
        mixing_of(Namespace())


@pytest.mark.parametrize(("text", "caps"), [("", {}), ("a=2 b=0.5", {"a": 2.0, "b": 0.5})])
def test_caps_of_sources(text, caps):
    flags = f"--dynmix-max-epochs {text}" if text else ""
    assert caps_of(parsed(flags), ["a", "b"]) == caps


@pytest.mark.parametrize("text", ["c=2", "a=0", "a=-1", "a", "a=nan", "=1", "a=x"])
def test_caps_that_are_none_are_refused(text):
    with pytest.raises(InputError, match=r"NAME=EPOCHS.*a, b"):
        caps_of(parsed(f"--dynmix-max-epochs {text}"), ["a", "b"])


@pytest.mark.parametrize("flag", sorted(REFUSED))
def test_what_cannot_work_is_refused_by_name(flag):
    check_flags(stock_args(**{flag: False}))
    with pytest.raises(InputError, match=f"^--{flag.replace('_', '-')} does not go with mixing: "):
        check_flags(stock_args(**{flag: True}))


PACKED = "--dynmix-packed-rows"
MASKLESS = {"create_attention_mask_in_dataloader": False}
STAGES = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("flags", "others", "words"),
    [
        ("", {"cuda_graph_impl": "local"}, "cuda-graph-impl is local"),
        ("", {"dataloader_type": "cyclic"}, "dataloader-type is cyclic"),
        ("", {"dataloader_type": "external"}, "dataloader-type is external"),
        ("", {"gtp_weight_remat_size": 2}, "gtp-weight-remat-size"),
        ("", {"sft": True}, "--sft alone"),
        ("", {"rampup_batch_size": [4, 4, 16], "step_batch_size_schedule": None}, "accepted and ignored"),
        ("--dynmix-padding-mask", {}, "--dynmix-padding-mask is about packed rows"),
        ("--dynmix-packed-attention", {}, "--dynmix-packed-attention is about packed rows"),
        (PACKED, {"sft": True}, "--sft must be left out"),
        (PACKED, {"transformer_impl": "transformer_engine"}, "needs --sft"),
        (PACKED, {"transformer_impl": "transformer_engine", "sft": True}, "micro-batch-size is 2"),
        (PACKED, {**MASKLESS, "tensor_model_parallel_size": 2}, "--no-create-attention-mask-in-dataloader"),
        (PACKED, {"context_parallel_size": 2}, "context-parallel-size is 2"),
        (PACKED, STAGES, "add --dynmix-packed-attention"),
        (PACKED, {"pipeline_model_parallel_size": 3}, "add --dynmix-packed-attention"),
        (f"{PACKED} --dynmix-padding-mask", {"moe_router_enable_expert_bias": True}, "expert-bias"),
    ],
)
def test_combinations_that_cannot_work_are_refused(flags, others, words):
    with pytest.raises(InputError, match=words):
        check_flags(stock_args(flags, **others))


def test_packed_rows_that_can_work_are_not_refused():
    check_flags(stock_args(PACKED, pipeline_model_parallel_size=2))
    check_flags(stock_args(PACKED, tensor_model_parallel_size=2))
    check_flags(stock_args(PACKED, **MASKLESS))
    check_flags(stock_args(f"{PACKED} --dynmix-packed-attention --dynmix-padding-mask", **STAGES))
    joined = {"transformer_impl": "transformer_engine", "sft": True, "micro_batch_size": 1}
    check_flags(stock_args(PACKED, **joined))


def make_files(folder, name, kinds):
    for kind in kinds:
        (folder / f"{name}.{kind}").touch()
    return str(folder / name)


def test_data_that_would_be_torn_apart_is_refused(tmp_path):
    plain = make_files(tmp_path, "web", ["bin", "idx"])
    prepared = make_files(tmp_path, "chat", ["bin", "idx", "json", "digests"])
    check_sources([plain], stock_args())
    check_sources([prepared], stock_args(PACKED))
    with pytest.raises(InputError, match=r"chat was written by.*torn apart.*--dynmix-packed-rows"):
        check_sources([plain, prepared], stock_args())
    with pytest.raises(InputError, match="web was not written by"):
        check_sources([prepared, plain], stock_args(PACKED))
    with pytest.raises(InputError, match=r"no .*chat.jsonl.idx"):
        check_sources([str(tmp_path / "chat.jsonl")], stock_args())


@pytest.mark.parametrize(
    ("prefixes", "names"),
    [
        (["/data/web", "/data/code"], ["web", "code"]),
        (["a/text_document", "b/text_document"], ["a.text_document", "b.text_document"]),
        (["/x/a/t", "/y/a/t"], ["x.a.t", "y.a.t"]),
        (["web"], ["web"]),
    ],
)
def test_sources_have_the_shortest_names_that_tell_them_apart(prefixes, names):
    assert names_of(prefixes) == names


def test_a_source_given_twice_is_refused():
    with pytest.raises(InputError, match="/data/web twice; give it once"):
        names_of(["/data/web", "/data/code", "/data/web"])


def test_only_pretrain_can_be_mixed():
    with pytest.raises(InputError, match="has no argument train_valid_test_dataset_provider"):
        mixed(lambda model: None)


def test_what_a_user_got_wrong_ends_the_process_with_two_and_one_message(monkeypatch, capsys):
    import megatron_dynmix.stock.entry as entry

    def refuse():
        raise InputError("that is wrong; do this")

    for rank, said in (("0", "megatron-dynmix: that is wrong; do this\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as end, entry._ending():
            refuse()
        assert (end.value.code, capsys.readouterr().err) == (2, said)
