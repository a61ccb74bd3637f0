"""Text to ids and back: by bytes, by characters, or by whatever the tokenizers package reads.

In a folder a tokenizer is always one file, tokenizer.json in the format of that package, so that others read it as we
do. That of plain bytes or characters is known by its form, and then the package is not needed.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from os.path import commonprefix
from pathlib import Path
from typing import Any

import numpy as np

from longwave.errors import shown
from longwave.machine import required

FILE = "tokenizer.json"
END, MASK = "<|endoftext|>", "[MASK]"
ENDS = (END, "</s>", "<eos>", "<|end_of_text|>", "[SEP]")  # what published tokenizers call the end of a document
SPACE = " \t\n\r\v\f"  # left out between characters
OTHERS = ("vocab.json", "tokenizer.model", "spiece.model", "vocab.txt")  # which transformers makes a tokenizer.json of
_REFUSED, _LEFT_OUT = -1, -2  # in the place of ids
_BEHIND = 1000  # ids, at most, that say how the next one is to be read


class Tokenizer:
    """What turns texts into ids and back.

    Args:
        text: of a tokenizer.json. But for plain bytes and characters, the tokenizers package is needed to use it.
    Attributes:
        text: the same.
        ids: of all tokens, by their names in the file.
        special: of those that stand for no text.
        vocab: how many ids there are: one above the largest.
        end: the id of the end of a document, or None.
    Raises:
        ValueError: where it is none.
    """

    def __init__(self, text: str):
        self.text = text
        try:
            self._about = json.loads(text)
            added, pieces = self._about["added_tokens"], self._about["model"]["vocab"]
            named = pieces.items() if isinstance(pieces, dict) else ((piece[0], i) for i, piece in enumerate(pieces))
            self.special = {token["content"]: int(token["id"]) for token in added if token["special"]}
            self.ids = {**dict(named), **{token["content"]: int(token["id"]) for token in added}}
            self.vocab = 1 + max(self.ids.values())
            self._plain = _plain(self._about, self.ids, self.special)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"it is not a {FILE} of the tokenizers package: {type(error).__name__}: {error}"
            ) from error
        self.end = next((self.ids[name] for name in ENDS if name in self.ids), None)
        self._package: Any = None

    def __repr__(self) -> str:
        kind = self._about["model"].get("type", "subwords") if self._plain is None else self._plain.words
        return f"{kind} of {self.vocab:,} ids"

    @property
    def letters(self) -> str | None:
        """Of a tokenizer of plain characters, these; else None."""
        return None if self._plain is None else self._plain.letters

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each document, without special ones: what looks like their names is text.

        Raises:
            ValueError: for a character that is none of its.
        """
        if self._plain is not None:
            return [self._plain.encode(text.encode()) for text in texts]
        package = self._opened(names=False)
        return [np.array(one.ids, np.uint32) for one in package.encode_batch(texts, add_special_tokens=False)]

    def prompt(self, text: bytes, begins: bool = True) -> list[int]:
        """The ids of a text to go on from, as transformers makes them: names of special tokens stand for these.

        Args:
            text: bytes, of which a tokenizer of bytes takes any and another UTF-8.
            begins: whether the ones that the file puts around a text are put there.
        Raises:
            ValueError: where it is no UTF-8, or for a character that is none of its.
        """
        if self._plain is not None:
            names = {name.encode(): i for name, i in self.special.items()}
            parts = re.split(b"(" + b"|".join(map(re.escape, names)) + b")", text) if names else [text]
            ids = [[names[part]] if part in names else self._plain.encode(part).tolist() for part in parts]
            return [i for part in ids for i in part]
        try:
            return self._opened(names=True).encode(text.decode(), add_special_tokens=begins).ids
        except UnicodeDecodeError as error:
            raise ValueError(f"the text is not UTF-8: {error.reason} at byte {error.start}; "
                             "only models of bytes take that") from error  # fmt: skip

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Special ones and those that it has not become nothing, half a character U+FFFD."""
        if self._plain is not None:
            return self._plain.decode(ids)
        return self._opened().decode(list(ids), skip_special_tokens=True)

    def agrees(self, other: "Tokenizer") -> bool:
        """Whether both make the same ids of a text; of special tokens either may have more."""
        names, others = ({i: name for name, i in one.special.items()} for one in (self, other))
        return self._rules() == other._rules() and all(names[i] == others[i] for i in names.keys() & others.keys())

    def with_end(self) -> "Tokenizer":
        """This, with one id more for the end of a document where it has none."""
        if self.end is not None:
            return self
        about = json.loads(self.text)
        about["added_tokens"] = [*about["added_tokens"], _special(END, self.vocab)]
        if about["model"].get("type") == "WordLevel":
            about["model"]["vocab"][END] = self.vocab
        return Tokenizer(_json(about))

    def check_fits(self, vocab: int | None, what: str) -> None:
        """Refuse it for a model of fewer ids; more are padding.

        Args:
            vocab: ids of the model; None where it takes none.
            what: the model, in the error.
        Raises:
            ValueError: with both numbers.
        """
        if vocab is None or vocab < self.vocab:
            has = "takes no ids" if vocab is None else f"knows {vocab:,}"
            raise ValueError(f"the tokenizer has {self.vocab:,} ids and {what} {has}; give the one it was trained with")

    def _rules(self) -> list[Any]:
        """What decides on the ids of a text, but for special tokens."""
        model, names = dict(self._about["model"]), self.special
        pieces = model.pop("vocab")
        plain = {n: i for n, i in pieces.items() if n not in names} if isinstance(pieces, dict) else pieces
        return [plain, model, self._about.get("normalizer"), self._about.get("pre_tokenizer")]

    def _opened(self, names: bool | None = None) -> Any:
        """Of the package; with ``names``, whether those of special tokens in a text stand for these."""
        if self._package is None:
            try:
                package = required("tokenizers", "data").Tokenizer.from_str(self.text)
            except ValueError:
                raise
            except Exception as error:  # it raises nothing narrower
                raise ValueError(f"the tokenizers package cannot read this {FILE}: {error}") from error
            package.no_truncation()
            package.no_padding()
            package.encode_special_tokens = names is False  # now: while a thread encodes it could not be set
            self._package = package
        elif names is not None and self._package.encode_special_tokens == names:
            self._package.encode_special_tokens = not names
        return self._package


class Decoder:
    """The text of ids as they come: what an id adds is said when its characters are whole.

    Args:
        behind: the ids before the first one, whose text was said.
        stop: a text that ends it.
    Attributes:
        stopped: whether it came; then no more is said.
    """

    def __init__(self, tokenizer: Tokenizer, behind: Sequence[int] = (), stop: str | None = None):
        self.stop, self.stopped, self._tail = stop, False, ""
        self.tokenizer, self._silent = tokenizer, set(tokenizer.special.values())
        self._ids = [i for i in behind[-_BEHIND:] if i not in self._silent]
        self._said, self._known = tokenizer.decode(self._ids), len(self._ids)

    def push(self, token: int) -> str:
        """What can be said with one id more."""
        if token in self._silent or token >= self.tokenizer.vocab:
            return ""
        self._ids.append(token)
        text = self.tokenizer.decode(self._ids)
        return "" if text.endswith("\ufffd") else self._say(text)

    def rest(self) -> str:
        """What is left at the end, half characters as U+FFFD."""
        return self._say(self.tokenizer.decode(self._ids))

    def _say(self, text: str) -> str:
        new = text[len(commonprefix([self._said, text])) :]  # noqa: RUF071 - characters are meant
        if new:  # what was said says how the next begins: with a space, or without
            self._ids = self._ids[self._known :]
            self._said, self._known = self.tokenizer.decode(self._ids), len(self._ids)
        return new if self.stop is None else self._until(self.stop, new)

    def _until(self, stop: str, new: str) -> str:
        if self.stopped:
            return ""
        text = self._tail + new
        place = text.find(stop)
        self.stopped = place >= 0
        said = text[len(self._tail) : place + len(stop)] if self.stopped else new
        self._tail = text[max(0, len(text) - len(stop) + 1) :]
        return said


class _Plain:
    """A byte of UTF-8 to an id, by a table.

    Args:
        ids: by bytes.
        letters: those that it knows, where they are characters.
        left_out: bytes that stand for nothing.
    """

    def __init__(self, ids: Mapping[int, int], letters: str | None = None, left_out: bytes = b""):
        self.letters = letters
        self.table = np.full(256, _REFUSED, np.int32)
        self.table[list(ids)] = list(ids.values())
        self.table[list(left_out)] = _LEFT_OUT
        self._bytes = {i: byte for byte, i in reversed(list(ids.items()))}  # of several, the first

    @property
    def words(self) -> str:
        return "bytes" if self.letters is None else f"characters {' '.join(self.letters)}"

    def encode(self, text: bytes) -> np.ndarray:
        ids = self.table[np.frombuffer(text, np.uint8)]
        if (ids == _REFUSED).any():
            place = int(np.flatnonzero(ids == _REFUSED)[0])
            letter = text[place : place + 4].decode(errors="ignore")[:1] or text[place : place + 1].decode("latin-1")
            raise ValueError(f"{shown(letter)} at byte {place + 1} is none of the {self.words}; take it out")
        return ids[ids >= 0] if (ids == _LEFT_OUT).any() else ids

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(self._bytes[i] for i in ids if i in self._bytes).decode(errors="replace")


def plain_bytes(*special: str) -> Tokenizer:
    """UTF-8, or any bytes: an id a byte, and from 256 on special ones by their names, such as END."""
    return Tokenizer(_json(_of_bytes(special)))


def characters(tokens: Sequence[str], same: Mapping[str, str]) -> Tokenizer:
    """A letter an id; spaces and ends of lines are left out, and all else is refused.

    Args:
        tokens: in the order of their ids: letters of ASCII, and names of special ones, which are longer.
        same: by a letter, those that are read as it.
    """
    return Tokenizer(_json(_of_characters(tokens, same)))


LETTERS = "ACGTN"
HYENADNA = ("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]", *LETTERS)  # of the published models
SAME = {"A": "a", "C": "c", "G": "g", "T": "tUu", "N": "nRrYySsWwKkMmBbDdHhVvXx"}


def dna(tokens: Sequence[str] = LETTERS) -> Tokenizer:
    """Single bases: U is T, codes for several bases are N, and lower case, by which repeats are marked, is as upper."""
    return characters(tokens, SAME)


PLAIN: dict[str, Callable[[], Tokenizer]] = {"bytes": plain_bytes, "dna": dna}


def find(name: str | Path) -> Tokenizer:
    """The tokenizer of a file, of a folder that has one, or of a repository OWNER/NAME of the Hub; "bytes" or "dna".

    Raises:
        ValueError: where there is none.
    """
    if str(name) in PLAIN:
        return PLAIN[str(name)]()
    path = Path(name).expanduser()
    file = path / FILE if path.is_dir() else path
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        file = _from_hub(str(name))
    if not file.is_file():
        made = ", ".join(other for other in OTHERS if (path / other).is_file())
        how = f"; transformers makes one of {made}: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        raise ValueError(f"there is no tokenizer at {shown(str(name))}; give {', '.join(PLAIN)}, a {FILE}, or a "
                         f"folder that has one{how if made else ''}")  # fmt: skip
    try:
        return Tokenizer(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{file}: {error}") from error


def _from_hub(name: str) -> Path:
    hub = required("huggingface_hub", "hf")
    try:
        return Path(hub.hf_hub_download(name, FILE))
    except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(
            f"there is no file {name}, nor a {FILE} of it that the Hub or its cache gives: {why}"
        ) from None


def learn(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Byte pairs (BPE over bytes, as GPT-2's) learned from texts.

    Source: Sennrich et al. (2016), arXiv:1508.07909, through the tokenizers package.

    Raises:
        ValueError: for fewer than 257 ids, which are the bytes and the end.
    """
    if vocab < 257:
        raise ValueError(f"vocab = {vocab} must be at least 257: the bytes and the end of a document")
    tokenizers = required("tokenizers", "data")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return Tokenizer(bpe.to_str(pretty=True))


def _json(about: dict[str, Any]) -> str:
    return json.dumps(about, ensure_ascii=False, indent=1) + "\n"


def _special(name: str, i: int) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": name, **plain, "special": True}


def _file(special: Mapping[str, int], **parts: Any) -> dict[str, Any]:
    """As the package writes it."""
    about: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None}
    added = [_special(name, i) for name, i in special.items()]
    return {**about, "added_tokens": added, "normalizer": None, "post_processor": None, **parts}


def _of_bytes(special: Iterable[str]) -> dict[str, Any]:
    """Byte pairs of which none was learned."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2 writes the others by characters from 256 on
    unseen = [byte for byte in range(256) if byte not in seen]
    names = {**{byte: chr(byte) for byte in seen}, **{byte: chr(256 + i) for i, byte in enumerate(unseen)}}
    none = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    off = dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return _file(
        {name: 256 + i for i, name in enumerate(special)},
        pre_tokenizer=level,
        decoder=level,
        model={"type": "BPE", **none, **off, "vocab": {names[byte]: byte for byte in range(256)}, "merges": []},
    )


def _of_characters(tokens: Sequence[str], same: Mapping[str, str]) -> dict[str, Any]:
    """Words of one letter. That what is unknown has no id makes the package refuse it, too."""
    ids = {token: i for i, token in enumerate(tokens)}
    read = [(SPACE, ""), *((others, letter) for letter, others in same.items())]
    rules = [{"type": "Replace", "pattern": {"Regex": f"[{others}]"}, "content": letter} for others, letter in read]
    return _file(
        {token: i for token, i in ids.items() if len(token) > 1},
        normalizer={"type": "Sequence", "normalizers": rules},
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False},
        decoder={"type": "Fuse"},
        model={"type": "WordLevel", "vocab": ids, "unk_token": "<none>"},
    )


def _plain(about: dict[str, Any], ids: Mapping[str, int], special: Mapping[str, int]) -> _Plain | None:
    """What reads a file of plain bytes or characters; None for any other."""
    if (about["post_processor"] or {}).get("special_tokens") == {}:  # as transformers writes that nothing is added
        about = {**about, "post_processor": None}
    if about == _of_bytes(sorted(special, key=special.__getitem__)):
        return _Plain({byte: byte for byte in range(256)})
    if about["model"].get("type") != "WordLevel" or (about["normalizer"] or {}).get("type") != "Sequence":
        return None
    rules = about["normalizer"]["normalizers"][1:]
    same = {rule.get("content"): rule.get("pattern", {}).get("Regex", "")[1:-1] for rule in rules}
    if about != _of_characters(sorted(ids, key=ids.__getitem__), same):
        return None
    letters = [token for token in ids if len(token) == 1]
    each = {ord(alias): ids[letter] for letter in letters for alias in letter + same.get(letter, "")}
    return _Plain(each, "".join(letters), SPACE.encode())
