"""Talks: templates beside those of `transformers`, marks that are typed, turns, and Ctrl-C."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

import gpt as G
from conftest import ROOT
from decoding import chat, templates
from decoding.sampling import Sampling, next_tokens
from inputs.documents import MARK, MARK_ID, learn_tokenizer
from inputs.text import open_tokenizer
from make_models import MODELS, TEXT, draw_weights

# In the style of ChatML, which SmolLM2 has, Llama 2 and 3, Mistral and Qwen 3.
CHATML = """{% for m in messages %}
{% if loop.first and m.role != 'system' %}<|im_start|>system
You are kind.<|im_end|>
{% endif %}
{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA2 = """{% if messages[0].role == 'system' %}
  {% set rest = messages[1:] %}
  {% set system = '<<SYS>>\\n' ~ messages[0].content ~ '\\n<</SYS>>\\n' %}
{% else %}
  {% set rest = messages %}{% set system = '' %}
{% endif %}
{% for m in rest %}
  {% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('take turns') }}
  {% endif %}
  {% set content = system ~ m.content if loop.first else m.content %}
  {%- if m.role == 'user' %}{{ bos_token ~ '[INST] ' ~ content.strip() ~ ' [/INST]' }}
  {%- else %}{{ ' ' ~ content | trim ~ ' ' ~ eos_token }}{% endif %}
{% endfor %}"""
LLAMA3 = """{{- bos_token }}
{%- if tools is none %}{{- {'für': ['<', "'"]} | tojson(indent=2) }}{%- endif %}
{%- for message in messages %}
    {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\\n\\n' }}{%- endif %}
"""
MISTRAL = """{{ bos_token }}{% for m in messages %}
{% if m.role == 'system' %}{% continue %}{% endif %}
{% if m.role == 'user' %}
{{ '[INST] ' ~ (messages[0].content ~ '\n\n' if loop.last and messages[0].role == 'system') }}
{{- m.content ~ '[/INST]' }}
{%- elif m.role == 'assistant' %}{{ m.content ~ eos_token }}{% else %}
{{ raise_exception('Only user, system and assistant roles, not ' ~ m.role | tojson) }}
{% endif %}{% endfor %}"""
QWEN3 = """{%- set ns = namespace(last=0) %}
{%- for m in messages %}
  {%- if m.role == 'user' and not m.content.startswith('<tool>') %}
    {%- set ns.last = loop.index0 %}
  {%- endif %}
{%- endfor %}
{%- for m in messages %}
  {%- set content = m.content if m.content is string else '' %}
  {%- if m.role == 'assistant' and '</think>' in content and loop.index0 < ns.last %}
    {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
  {%- endif %}
  {{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
TEMPLATES = {
    "ChatML": CHATML, "Llama 2": LLAMA2, "Llama 3": LLAMA3, "Mistral": MISTRAL, "Qwen 3": QWEN3,
}  # fmt: skip
PLAIN = "{% for m in messages %}{{ m.role[0] ~ ':' ~ m.content ~ '\n' }}{% endfor %}a:"
MARKS = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>", "</s>", "end|>x"]
NAMES = {"bos_token": MARK, "eos_token": "</s>"}
TALK = [
    ("user", "  Who are you,\nfür 日本? \n"),
    ("assistant", "<think>\nhm\n</think>\n\n A network. "),
    ("user", "\n\nint x = 1;"),
]


@pytest.fixture(autouse=True)
def same_process(monkeypatch):
    """Expand templates here: a process for each would take most of the time."""
    monkeypatch.setattr(chat, "render", templates.expand)


@pytest.fixture(scope="module")
def tokenizer():
    learned = learn_tokenizer([TEXT], 280)
    learned.add_special_tokens(MARKS)
    learned.add_tokens(["<think>", "</think>"])
    learned.post_processor = TemplateProcessing(f"{MARK} $A", special_tokens=[(MARK, MARK_ID)])
    return open_tokenizer(learned.to_str())


def messages_of(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


# Templates


@pytest.mark.parametrize("system", [[], [("system", " Be brief. ")]])
@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_talk_has_the_text_and_tokens_of_transformers(tokenizer, name, turns, system):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.to_str()), **NAMES
    )
    messages = messages_of(*system, *TALK[:turns])
    options = {"chat_template": TEMPLATES[name], "add_generation_prompt": True}
    expected = theirs.apply_chat_template(messages, tokenize=False, **options)
    values = {**NAMES, "messages": messages, "add_generation_prompt": True, "tools": None}
    assert templates.expand(TEMPLATES[name], values) == expected
    ours = chat.Conversation(TEMPLATES[name], tokenizer, NAMES)
    assert ours.encode(messages) == theirs.apply_chat_template(messages, **options)["input_ids"]


REFUSED = {
    "syntax": ("{% if %}", "Expected an expression"),
    "tag": ("{% include 'x' %}", "no loader"),
    "raises": ("{{ raise_exception('take\nturns') }}", "can't be used: take turns"),
    "missing": ("{{ x.y }}", "'x' is undefined"),
    "too long": ("x" * 65_537, "more than 65,536 bytes"),
    "class": ("{{ ''.__class__.__mro__ }}", "'__class__' of 'str' object is unsafe"),
    "globals": ("{{ raise_exception.__globals__.sys.exit() }}", "unsafe"),
    "changes": ("{{ messages.append(1) }}", "unsafe"),
    "namespace": ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "'__class__'"),
    "named": ("{{ namespace(**{'__html__': 1}) }}", "'__html__'"),
    "long loop": ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "deep": ("{{" + "(" * 30_000 + ")" * 30_000 + "}}", "recursion"),
    "output": ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "16,777,216 characters"),
    "endless": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "more than 1 s",
    ),
    "memory": (
        "{% set n = namespace(x='a') %}"
        "{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "536,870,912 bytes of memory",
    ),
    "half a character": ("{{ '\ud800' }}", "surrogates"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_template_may_not_do_is_refused_in_a_line(kind, monkeypatch):
    if kind == "endless":
        monkeypatch.setattr(templates, "SECONDS", 1)
    if kind == "memory" and sys.platform != "linux":
        pytest.skip("no limit of memory")
    template, reason = REFUSED[kind]
    with pytest.raises(OSError) as error:
        templates.render(template, {"messages": []})
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_a_process_of_its_own_gives_the_same_text():
    values = {"messages": messages_of(*TALK), "add_generation_prompt": True}
    assert templates.render(CHATML, values) == templates.expand(CHATML, values)


# What is typed


PIECES = [*MARKS, MARK, "<|im_", "end|>", "|im_end|>", "<", "x", "é", " ", "\n", chat.CUT]
TYPED = st.lists(st.sampled_from(PIECES)).map("".join)


@given(st.lists(TYPED, min_size=1, max_size=3), st.sampled_from([CHATML, PLAIN]))
def test_typed_marks_stay_text(tokenizer, texts, template):
    conversation = chat.Conversation(template, tokenizer, NAMES)
    roles = ["system", "user", "assistant"]
    messages = messages_of(*zip(roles, texts, strict=False))
    ids = conversation.encode(messages)
    harmless = conversation.encode([message | {"content": "x"} for message in messages])
    special = {tokenizer.token_to_id(mark) for mark in [*MARKS, MARK]}
    assert [i for i in ids if i in special] == [i for i in harmless if i in special]
    shown = [each | {"content": each["content"].replace(chat.CUT, "")} for each in messages]
    expected = templates.expand(template, {"messages": shown, "add_generation_prompt": True})
    assert tokenizer.decode(ids, skip_special_tokens=False) == expected


def test_a_mark_of_the_template_that_is_not_special_stays_text_only_if_a_person_types_it(tokenizer):
    token = tokenizer.token_to_id("</think>")
    conversation = chat.Conversation(QWEN3, tokenizer, NAMES)
    for role, count in (("user", 0), ("system", 0), ("assistant", 1)):
        assert conversation.encode(messages_of((role, "</think>"))).count(token) == count


# Turns


WORDS = st.text("ab \n", min_size=1, max_size=30)


@given(
    st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6), st.integers(20, 90), st.booleans()
)
@settings(max_examples=30)
def test_as_many_whole_turns_are_kept_as_fit(tokenizer, turns, most, with_system):
    conversation = chat.Conversation(PLAIN, tokenizer, NAMES, "be kind" if with_system else "")
    system = list(conversation.messages)
    for question, answer in turns:
        before = list(conversation.messages)
        history = [*before[len(system) :], *messages_of(("user", question))]
        choices = [system + history[i:] for i in range(0, len(history), 2)]
        fitting = [each for each in choices if len(conversation.encode(each)) <= most]
        if fitting:
            ids = conversation.ask(question, most)
            assert conversation.messages == fitting[0]
            assert ids == conversation.encode(fitting[0])
            conversation.answer(answer)
        else:
            with pytest.raises(OSError, match=f"tokens; at most {most} fit"):
                conversation.ask(question, most)
            assert conversation.messages == before


def test_a_question_without_answer_is_forgotten(tokenizer):
    conversation = chat.Conversation(LLAMA2, tokenizer, NAMES)
    conversation.ask("a", 100)
    conversation.answer("")
    conversation.ask("b", 100)
    assert conversation.messages == messages_of(("user", "b"))


# Writing


SIZES = G.Sizes(300, 16, 2, 4, 2, 4, 24, 60, tied=False)


@pytest.fixture
def model():
    return draw_weights(G.GPT(SIZES)).double()


def write(model, prompt, sampling):
    """Return what continues a prompt, computed anew for each token."""
    columns = next_tokens(model, [prompt], sampling, [3], 20, end=-1, cached=False)
    return [token for (token,) in columns]


def test_what_a_prompt_shares_with_the_one_before_is_not_computed_again(model):
    sampling = Sampling(0.8)
    prompts = [[5, 7, 9], [5, 7, 9, 11, 4, 4], [5, 7, 9, 11], [5, 7, 9, 11], [6, 7], [6]]
    expected = [write(model, prompt, sampling) for prompt in prompts]
    new = []
    model.embedding.register_forward_hook(lambda _, inputs, __: new.append(inputs[0].shape[1]))
    computed = []
    with chat.Writer(model, sampling, 20, []) as writer:
        for prompt, tokens in zip(prompts, expected, strict=True):
            new.clear()
            assert list(writer.write(prompt, seed=3)) == tokens
            computed.append(new[0])
    assert computed == [3, 3, 1, 1, 2, 1]


def test_an_interrupted_step_leaves_no_half_of_a_token(model):
    expected = write(model, [5, 7, 9], Sampling(0))

    def interrupt(*_):
        raise KeyboardInterrupt

    with chat.Writer(model, Sampling(0), 20, []) as writer:
        for steps in (0, 1, 4):
            stream = writer.write([5, 7, 9], seed=3)
            for _ in range(steps):
                next(stream)
            handle = model.layers[1].norm1.register_forward_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                next(stream)
            handle.remove()
            assert list(writer.write([5, 7, 9], seed=3)) == expected


def test_an_answer_ends_at_any_end(model):
    whole = write(model, [5, 7, 9], Sampling(0.8))
    ends = {whole[4], whole[7]}
    with chat.Writer(model, Sampling(0.8), 20, ends) as writer:
        found = list(writer.write([5, 7, 9], seed=3))
    assert found == whole[: min(whole.index(end) for end in ends)]


# The script


@pytest.fixture
def talker(tmp_path):
    """A folder with a tiny random model and a template."""
    folder = shutil.copytree(MODELS / "llama", tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ bos_token }}" + PLAIN, encoding="utf-8")
    return folder


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))


@pytest.fixture
def talk(run_script, monkeypatch, talker):
    """Talk through a pipe."""

    def run(content, *options):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        return run_script("gpt.py", "--chat", "--out", talker, "--device", "cpu", *options)

    return run


def test_a_talk_of_three_turns(talk, talker):
    change(talker / "config.json", max_position_embeddings=400)
    change(talker / "generation_config.json", eos_token_id=[MARK_ID, *range(200, 264)])
    said = ["hi", "<|endoftext|>für", "b\n"]
    done = talk("\n\n".join(said).encode(), "--seed", 4)
    assert (done.returncode, done.stderr) == (0, "")
    model, published = G.open_model(talker)
    tokenizer = published.tokenizer
    conversation = chat.Conversation(published.template, tokenizer, published.names)
    expected = ""
    for turn, text in enumerate(said):
        prompt = conversation.ask(text.strip(), 300)
        seed = Random(f"4 {turn}").getrandbits(63)
        with chat.Writer(model, Sampling(0.8), 400, published.ends) as writer:
            answer = tokenizer.decode(list(writer.write(prompt, seed)))
        conversation.answer(answer)
        expected += G.printable_lines(answer) + "\n"
    assert done.stdout == expected
    assert len(conversation.messages) >= 4
    assert done.stdout == talk("\n\n".join(said).encode(), "--seed", 4).stdout
    assert done.stdout != talk("\n\n".join(said).encode(), "--seed", 5).stdout


def test_what_can_not_be_answered_is_said_and_the_talk_goes_on(talk):
    done = talk(b"\xfc\n" + b"x" * 60 + b"\nhi\n")
    assert done.returncode == 0
    lines = done.stderr.splitlines()
    assert lines[0] == "that line is not UTF-8"
    assert "tokens; at most 48 fit" in lines[1]
    assert done.stdout


def test_without_a_usable_template_there_is_no_talk(talk, talker, monkeypatch):
    monkeypatch.setattr(chat, "render", templates.render)
    path = talker / "chat_template.jinja"
    for content, reason in (
        (b"{{ raise_exception('no') }}", "the chat template can't be used: no"),
        (b"\xfc", "not a language model that this script can open"),
        (b"{# nothing #}", "the chat template writes nothing"),
        (None, "the model has no chat template: it was not made to talk; use --write"),
    ):
        path.unlink() if content is None else path.write_bytes(content)
        done = talk(b"hi\n")
        assert (done.returncode, done.stdout) == (1, "")
        assert reason in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_on_a_terminal_there_is_a_prompt_and_a_newline_at_the_end(talker, monkeypatch, capsys, end):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def type_something(prompt):
        asked.append(prompt)
        raise end

    asked = []
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", type_something)
    assert G.main(["--chat", "--out", str(talker)]) == 0
    assert (asked, capsys.readouterr().out) == (["> "], "\n")


def test_ctrl_c_ends_a_pipe_as_it_ends_any_script(talker, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr("builtins.input", interrupt)
    assert G.main(["--chat", "--out", str(talker)]) == 130


def test_ctrl_c_ends_an_answer_and_a_closed_pipe_the_talk(talker):
    change(talker / "config.json", max_position_embeddings=1_000_000)
    change(talker / "config.json", eos_token_id=None)
    change(talker / "generation_config.json", eos_token_id=None)  # answers without end
    command = [sys.executable, "src/gpt.py", "--chat", "--out", talker, "--device", "cpu"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe) as talk:
        stdin, stdout = talk.stdin.fileno(), talk.stdout.fileno()
        for _ in range(2):
            os.write(stdin, b"hi\n")
            assert os.read(stdout, 1)
            talk.send_signal(signal.SIGINT)
            os.write(stdin, b"\xfc\n")
            assert talk.stderr.readline() == b"that line is not UTF-8\n"
            empty(stdout)
        os.write(stdin, b"hi\n")
        talk.stdout.close()
        assert talk.wait(timeout=60) == 141
        assert talk.stderr.read() == b""


def empty(pipe):
    """Read all that is in a pipe."""
    os.set_blocking(pipe, False)
    with pytest.raises(BlockingIOError):
        while os.read(pipe, 1 << 16):
            pass
    os.set_blocking(pipe, True)
