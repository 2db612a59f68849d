"""Chapter 8: talking to a model. From messages to tokens, from tokens to text, and turns between.

A chat model has been trained on conversations written down in one fixed form, its template. Control
tokens, which no text contains, mark where each turn begins and ends. SmolLM2's looks like this:

    <|im_start|>user
    Why is the sky blue?<|im_end|>
    <|im_start|>assistant

and the model goes on from there until it makes an <|im_end|> itself. A checkpoint carries its
template as a program in a small language, Jinja. The common ones stand here as Python functions,
short enough to read, but without the parts for tools; any other is run as it is.

Some models think before they answer, between <think> and </think>. A later turn need not read that
again, so most of their templates leave old thoughts out. `thinking` is for models that can do
either: True, False, or None for what the template does when nobody says.

    render         messages -> control tokens and the text between them
    encode_chat    messages -> token ids
    stream_text    token ids -> pieces of text, as soon as their characters are whole
    Chat           a conversation that feeds the model only what is new in each turn
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
from torch import Tensor

from ch08_full_models.download import CheckpointError

if TYPE_CHECKING:
    import jinja2

    from ch08_full_models.tokenizer import Tokenizer

Message = dict[str, str]  # {"role": "system", "user" or "assistant", "content": the text}

# Two of the characters that Unicode reserves for use inside a program. Texts lose them.
GUARD, ANSWER = "\ufdd0", "\ufdd1"


# Templates: each returns the conversation as one text, with the assistant's turn opened or not.


def chatml(messages: list[Message], open_turn: bool, system: str = "") -> str:
    """ChatML, the most common format. `system` is what is said when the messages say nothing."""
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
    return "".join(turns) + ("<|im_start|>assistant\n" if open_turn else "")


def llama3(messages: list[Message], open_turn: bool) -> str:
    """Llama 3 as first released; 3.1 and later begin with a date, and run their own template."""
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    turns = [f"{head.format(m['role'])}{m['content'].strip()}<|eot_id|>" for m in messages]
    return "<|begin_of_text|>" + "".join(turns) + (head.format("assistant") if open_turn else "")


def gemma(messages: list[Message], open_turn: bool) -> str:
    """Gemma, which says "model" for assistant, and has a system text in the user's first turn."""
    system, turns = split_system(messages)
    text = "<bos>"
    for i, m in enumerate(turns):
        role = "model" if m["role"] == "assistant" else m["role"]
        content = (system if i == 0 else "") + m["content"].strip()
        text += f"<start_of_turn>{role}\n{content}<end_of_turn>\n"
    return text + ("<start_of_turn>model\n" if open_turn else "")


def mistral(messages: list[Message], open_turn: bool) -> str:
    """Mistral 7B v0.3, which reads a system text in the user's last turn; [/INST] opens its own."""
    system, turns = split_system(messages)
    text = "<s>"
    for i, m in enumerate(turns):
        content = (system if i == len(turns) - 1 else "") + m["content"]
        answers = m["role"] == "assistant"
        text += f" {m['content'].strip()}</s>" if answers else f"[INST] {content}[/INST]"
    return text


def qwen3(messages: list[Message], open_turn: bool, thinking: bool = True) -> str:
    """Qwen3: ChatML, and thoughts stay only after the last question. To answer without thinking, it
    finds an empty thought already written."""
    questions = [i for i, m in enumerate(messages) if m["role"] == "user"]
    last = questions[-1] if questions else len(messages) - 1
    told = []
    for i, m in enumerate(messages):
        if m["role"] == "assistant":
            thought, answer = split_thought(m["content"])
            if i > last and (thought or i == len(messages) - 1):
                answer = "<think>\n" + thought + "\n</think>\n\n" + answer.lstrip("\n")
            m = m | {"content": answer}
        told.append(m)
    no_thought = "<think>\n\n</think>\n\n" if open_turn and not thinking else ""
    return chatml(told, open_turn) + no_thought


def split_thought(text: str) -> tuple[str, str]:
    """The thought, or "", and the answer after it."""
    if "</think>" not in text:
        return "", text
    thought, *_, answer = text.split("</think>")
    return thought.split("<think>")[-1].strip("\n"), answer.lstrip("\n")


def deepseek(messages: list[Message], open_turn: bool, thinks: bool = False) -> str:
    """DeepSeek-V3, with bars as wide as Chinese characters. R1 `thinks`, and drops old thoughts."""
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    text = f"<｜begin▁of▁sentence｜>{system}"
    for m in messages:
        content = m["content"].split("</think>")[-1] if thinks else m["content"]
        if m["role"] == "user":
            text += f"<｜User｜>{m['content']}"
        elif m["role"] == "assistant":
            text += f"<｜Assistant｜>{content}<｜end▁of▁sentence｜>"
    opening = "<｜Assistant｜><think>\n" if thinks else "<｜Assistant｜>"
    return text + (opening if open_turn else "")


def olmo2(messages: list[Message], open_turn: bool) -> str:
    """OLMo 2, whose names of roles are text; its only control token begins a text, and ends one."""
    text = "<|endoftext|>"
    for m in messages:
        end = "<|endoftext|>" if m["role"] == "assistant" else ""
        text += f"<|{m['role']}|>\n{m['content']}{end}\n"
    if messages[-1]["role"] == "assistant":
        text = text.removesuffix("\n")
    return text + ("<|assistant|>\n" if open_turn else "")


def llama4(messages: list[Message], open_turn: bool) -> str:
    """Llama 4, which trims the system message only."""
    head = "<|header_start|>{}<|header_end|>\n\n"
    first, *rest = messages
    if first["role"] == "system":
        first = first | {"content": first["content"].strip()}
    turns = [f"{head.format(m['role'])}{m['content']}<|eot|>" for m in (first, *rest)]
    return "<|begin_of_text|>" + "".join(turns) + (head.format("assistant") if open_turn else "")


def split_system(messages: list[Message]) -> tuple[str, list[Message]]:
    """The system message, with an empty line after it, or ""; and the turns.

    Raises CheckpointError unless user and assistant take turns, the user first.
    """
    given = messages[0]["role"] == "system"
    system, turns = (messages[0]["content"] + "\n\n", messages[1:]) if given else ("", messages)
    for i, m in enumerate(turns):
        role = ("user", "assistant")[i % 2]
        if m["role"] != role:
            raise CheckpointError(f"turn {i + 1} is the {m['role']}'s, expected the {role}'s")
    return system, turns


SMOLLM2 = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QWEN2 = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
TEMPLATES = (
    partial(chatml, system=SMOLLM2),
    partial(chatml, system=QWEN2),
    chatml,
    llama3,
    gemma,
    mistral,
    qwen3,
    partial(qwen3, thinking=False),
    deepseek,
    partial(deepseek, thinks=True),
    olmo2,
    llama4,
)

# Ours stands in for a checkpoint's own template if both write these the same, or both refuse them.
# They show what else relatives do: trim a text, drop old thoughts, say the date, put a system
# message elsewhere, join two of them, mind who spoke last.
TALK = [
    {"role": "system", "content": " Be brief.\n"},
    {"role": "user", "content": " Hi\n"},
    {"role": "assistant", "content": "<think>\nHm\n</think>\n\n Hello\n"},
    {"role": "user", "content": "\n Why? "},
]
LAST = {"role": "assistant", "content": "\n So. \n"}
SAMPLES = (
    TALK[1:2],
    TALK,
    [*TALK, TALK[2]],
    [*TALK, TALK[2], LAST, LAST],
    [TALK[0], *TALK],
)


# From messages to tokens


class Special(str):
    """A control token in its written form: "<|im_end|>"."""


def render(
    tokenizer: "Tokenizer",
    messages: list[Message],
    open_turn: bool = True,
    thinking: bool | None = None,
) -> list[str | Special]:
    """The conversation as control tokens and the texts between them, with the assistant's turn
    opened or not, and made to think or not.

    A control token that somebody wrote into a message stays text: nobody can forge a turn.
    Raises CheckpointError for a base model, which has no template, and for messages that the
    template refuses.
    """
    template = find_template(tokenizer, thinking)
    guarded = [m | {"content": guard(tokenizer, m["content"])} for m in messages]
    return split(tokenizer, template(guarded, open_turn))


def encode_chat(
    tokenizer: "Tokenizer",
    messages: list[Message],
    open_turn: bool = True,
    thinking: bool | None = None,
) -> list[int]:
    """The conversation's token ids. The options are those of render, and so are the errors."""
    return encode_segments(tokenizer, render(tokenizer, messages, open_turn, thinking))


def encode_segments(tokenizer: "Tokenizer", segments: list[str | Special]) -> list[int]:
    """The ids of control tokens, and of the texts between them, each encoded in one piece."""
    ids: list[int] = []
    for segment in segments:
        if isinstance(segment, Special):
            ids.append(tokenizer.id_of(segment))
        else:
            ids += encode_text(tokenizer, segment, goes_on=bool(ids))
    return ids


def encode_text(tokenizer: "Tokenizer", text: str, goes_on: bool = True) -> list[int]:
    """The ids of a text within a conversation, in which control tokens' names are just letters."""
    return tokenizer.encode(text, bos=False, parse_special=False, goes_on=goes_on)


# What a control token may look like: <|im_end|>, <start_of_turn>, [INST].
CONTROL = re.compile(r"<[^<>\[\]\s]+>|\[[^<>\[\]\s]+\]")


def is_control(tokenizer: "Tokenizer", token: str) -> bool:
    """True for a control token, unless text may have it: Gemma's <h1>, Qwen3's <think>."""
    token_id = tokenizer.id_of(token)
    text_ids = [token_id] if token_id is None else encode_text(tokenizer, token)
    return text_ids != [token_id]


def guard(tokenizer: "Tokenizer", text: str) -> str:
    """The text, with a mark inside each control token, so that `split` does not take it for one."""

    def mark(found: re.Match) -> str:
        token = found[0]
        return token[0] + GUARD + token[1:] if is_control(tokenizer, token) else token

    return text if text == ANSWER else CONTROL.sub(mark, re.sub(f"[{GUARD}{ANSWER}]", "", text))


def split(tokenizer: "Tokenizer", text: str) -> list[str | Special]:
    """The text, cut at its control tokens; guarded ones lose their mark."""
    segments: list[str | Special] = []
    end = 0
    for found in CONTROL.finditer(text):
        if is_control(tokenizer, found[0]):
            segments += [text[end : found.start()], Special(found[0])]
            end = found.end()
    segments.append(text[end:])
    return [s if isinstance(s, Special) else s.replace(GUARD, "") for s in segments if s]


def find_template(
    tokenizer: "Tokenizer", thinking: bool | None = None
) -> Callable[[list[Message], bool], str]:
    """Our version of the checkpoint's template, or its own. Raises CheckpointError without one."""
    if tokenizer.chat_template is None:
        raise CheckpointError("a base model, with no chat template: it can only go on (--raw)")
    theirs = partial(run_jinja, tokenizer, thinking)
    expected = on_samples(theirs)
    return next((ours for ours in TEMPLATES if on_samples(ours) == expected), theirs)


def on_samples(template: Callable[[list[Message], bool], str]) -> list[str | None]:
    """What the template makes of each sample, with the turn opened and not; None if it refuses."""
    written: list[str | None] = []
    for sample in SAMPLES:
        for open_turn in (True, False):
            try:
                written.append(template(sample, open_turn))
            except CheckpointError:
                written.append(None)
    return written


def run_jinja(
    tokenizer: "Tokenizer", thinking: bool | None, messages: list[Message], open_turn: bool
) -> str:
    """The conversation as the checkpoint's own template writes it. Raises CheckpointError."""
    # Two names are common: Qwen3's and SmolLM3's, and DeepSeek-V3.1's.
    switch = {} if thinking is None else {"enable_thinking": thinking, "thinking": thinking}
    try:
        return compile_jinja(tokenizer.chat_template).render(
            messages=messages,
            tools=None,  # templates ask whether it is none, not only whether it is there
            add_generation_prompt=open_turn,
            bos_token=tokenizer.bos_token or "",
            eos_token=tokenizer.eos_token or "",
            **switch,
        )
    except Exception as err:  # a stranger's program may fail in any way
        raise CheckpointError(f"the chat template failed: {' '.join(str(err).split())}") from err


@lru_cache
def compile_jinja(source: str) -> "jinja2.Template":
    """The template, ready to run: it comes from the checkpoint, so only within Jinja's sandbox.

    What templates may rely on besides Jinja itself is what transformers gives them.
    """
    from datetime import datetime

    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what is trained on. Here it changes nothing."""

        tags = {"generation"}

        def parse(self, parser: "jinja2.parser.Parser") -> list["jinja2.nodes.Node"]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    return environment.from_string(source)


# From tokens to text


def stream_text(tokenizer: "Tokenizer", ids: Iterable[int]) -> Iterator[str]:
    """The tokens' text, in pieces that never cut a character.

    Together they are tokenizer.decode(ids). A token's text depends on those before it: a character
    may be spread over up to four, and some tokenizers drop the first space. So the last few are
    decoded together each time, and what is new is passed on.
    """
    last: list[int] = []
    n_sent = 0  # characters of their text that have been passed on
    for token in ids:
        name = tokenizer.model.token_of(token)
        if name is None or (tokenizer.id_of(name) == token and not tokenizer.decode([token])):
            continue  # a control token has no text
        last.append(token)
        if BYTE.fullmatch(name):
            continue  # a run of these is read as a whole: one wrong byte would change all of it
        text = whole_text(tokenizer.decode(last))
        if len(text) > n_sent:
            yield text[n_sent:]
        if len(last) > 32:
            last = last[-16:]
            text = whole_text(tokenizer.decode(last))
        n_sent = len(text)
    if rest := tokenizer.decode(last)[n_sent:]:
        yield rest


BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # how SentencePiece writes a byte that is no character


def whole_text(text: str) -> str:
    """The text without a last U+FFFD, which may be a character of which bytes are still to come."""
    return text.removesuffix("\ufffd")


# Turns


class Chat:
    """A conversation. The model's cache stays from turn to turn, and is only ever added to.

    So a turn costs what is new in it: the last token of the answer, which has not been fed yet,
    the end of that turn, and what the user says next. But a template may write what is past in
    another way than it was fed: without the thoughts, as Qwen3's and DeepSeek-R1's do. Then the
    whole conversation is fed anew, shorter than it was.
    """

    def __init__(
        self,
        model: nn.Module,
        generate: Callable[..., Iterator[Tensor]],
        tokenizer: "Tokenizer",
        n_new: int = 256,
        system: str | None = None,
        thinking: bool | None = None,
        **sampling: float | int | None,
    ) -> None:
        """generate and sampling (temperature, top_k, top_p, seed) are the family module's. thinking
        is render's."""
        self.model, self.generate, self.tokenizer = model, generate, tokenizer
        self.n_new = n_new  # tokens an answer may have
        self.thinking, self.sampling = thinking, sampling
        self.messages = [{"role": "system", "content": system}] if system else []
        self.ids: list[int] = []  # of the whole conversation; the cache holds the first of them
        self.fed: list[str | Special] = []  # the same, as it was up to where the last answer began
        self.cache = model.new_cache()
        self.stopped = ""  # why the last answer ended: "end", "length" or "context"

    def answer(self, text: str) -> Iterator[str]:
        """Says the text to the model, and yields its answer piece by piece.

        Whoever stops listening, or presses Ctrl-C, stops the answer; the chat can go on.
        Raises CheckpointError if the conversation no longer fits the model's context.
        """
        user = {"role": "user", "content": text}
        whole = render(self.tokenizer, [*self.messages, user], thinking=self.thinking)
        new = self.after_answer(user, whole)
        pieces = self.go_on(encode_segments(self.tokenizer, new or whole), anew=not new)
        self.fed = whole
        answer = {"role": "assistant", "content": ""}
        self.messages += [user, answer]
        for piece in pieces:
            answer["content"] += piece
            yield piece

    def after_answer(self, user: Message, whole: list[str | Special]) -> list[str | Special] | None:
        """What follows the last answer in the whole conversation. None if there was no answer, or
        if the template now writes it, or what was before it, in another way than it was fed."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            return None
        *before, answer = self.messages
        marked = [*before, answer | {"content": ANSWER}, user]
        segments = render(self.tokenizer, marked, thinking=self.thinking)
        at = next((i for i, segment in enumerate(segments) if ANSWER in segment), None)
        if at is None:
            return None
        left, _, right = segments[at].partition(ANSWER)
        past, new = [*segments[:at], left], [right, *segments[at + 1 :]]
        if bare(past) != bare(self.fed) or bare([*past, answer["content"], *new]) != bare(whole):
            return None
        return new if right else new[1:]

    def go_on(self, ids: list[int], anew: bool = False) -> Iterator[str]:
        """Feeds the tokens, and yields what the model makes of them, as text. With `anew` the
        conversation begins with them.

        Raises CheckpointError, at once, if there is no room for them in the model's context.
        """
        n_ids, room = len(ids) + (0 if anew else len(self.ids)), self.model.cfg.max_seq_len
        if n_ids > room:
            raise CheckpointError(f"{n_ids:,} tokens are more than the model's context of {room:,}")
        if anew:
            self.ids, self.cache = [], self.model.new_cache()
        self.ids += ids
        # The last new token is not fed, so it need not fit.
        return stream_text(self.tokenizer, self.new_tokens(min(self.n_new, room - n_ids + 1)))

    def new_tokens(self, n_new: int) -> Iterator[int]:
        """Feeds what the cache does not hold yet; yields tokens until one ends the turn."""
        unfed = self.ids[self.cache[0].n_seen :]
        device = next(self.model.parameters()).device
        tokens_1T = torch.tensor([unfed], device=device)
        self.stopped = "length" if n_new == self.n_new else "context"
        try:
            for token_11 in self.generate(
                self.model, tokens_1T, n_new, cache=self.cache, **self.sampling
            ):
                token = int(token_11)
                if token in self.tokenizer.eos_ids:
                    self.stopped = "end"  # the template writes the token itself
                    return
                self.ids.append(token)
                yield token
        except GeneratorExit:  # nobody listens any more; between two tokens the cache is whole
            raise
        except BaseException:  # Ctrl-C, most likely: some layers saw a token, others did not
            self.cache = self.model.new_cache()
            raise


def bare(segments: list[str | Special]) -> str:
    """The text without its spaces and line ends, about which templates are of many minds."""
    return "".join("".join(segments).split())
