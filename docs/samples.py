"""Small files of every kind, drawn or of the novel that comes along: for pictures of the tasks that read files."""

import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np

from longwave.tasks import (
    DNA,
    Audio,
    AudioTokens,
    DNALabels,
    DocumentPairs,
    Documents,
    Forecast,
    SeriesLabels,
    Species,
    Task,
    TokenizedText,
    corpus,
)
from longwave.tasks.text import BOOKS

RANDOM = np.random.default_rng(0)


def paragraphs() -> list[str]:
    """Of the novel, without line breaks."""
    return [" ".join(part.split()) for part in (BOOKS / "emma.txt").read_text().split("\n\n") if len(part) > 120]


def documents(folder: Path) -> Task:
    """Paragraphs in which somebody speaks, and others."""
    for number, text in enumerate(paragraphs()[:200]):
        file = folder / ("speech" if '"' in text else "narration") / f"{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return Documents(folder=str(folder), length=100)


def document_pairs(folder: Path) -> Task:
    """Two parts of one paragraph, or of two."""
    texts = paragraphs()[:60]
    rows = [(i % 2, texts[i][:60], texts[i if i % 2 else i - 1][60:120]) for i in range(60)]
    for part in ("train", "eval", "test"):
        (folder / f"x.{part}.tsv").write_text("".join(f"{label}\ta\tb\t{a}\t{b}\n" for label, a, b in rows))
    return DocumentPairs(folder=str(folder))


def tokens(folder: Path) -> Task:
    """Byte pairs of the novel."""
    corpus.tokenize([str(BOOKS / "emma.txt")], folder / "corpus", 1024)
    return TokenizedText(folders=[str(folder / "corpus")], length=30)


def sound(file: Path, pitch: float, formant: float, seconds: float) -> None:
    """A vowel: a voice of some pitch, loudest around a formant, that begins and ends."""
    time = np.arange(round(8000 * seconds)) / 8000
    harmonics = np.arange(1, 20)[:, None]
    loud = np.exp(-(((pitch * harmonics - formant) / 250) ** 2)) + 0.3 / harmonics
    x = (loud * np.sin(2 * np.pi * pitch * harmonics * time)).sum(0) * np.sin(np.pi * time / seconds)
    file.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(file), "wb") as out:
        out.setparams((1, 2, 8000, 0, "NONE", ""))
        out.writeframes((x / np.abs(x).max() * 20000).astype("<i2").tobytes())


def audio(folder: Path) -> Task:
    """Two vowels in several voices."""
    for vowel, formant in (("a", 800.0), ("u", 300.0)):
        for number in range(10):
            sound(folder / vowel / f"{number}.wav", RANDOM.uniform(90, 220), formant, RANDOM.uniform(0.04, 0.1))
    return Audio(folder=str(folder))


def audio_tokens(folder: Path) -> Task:
    """One of them as levels."""
    sound(folder / "a.wav", 120, 800, 0.4)
    return AudioTokens(files=[str(folder)], length=400)


def genome(file: Path, gc: float, length: int = 3000) -> None:
    """Random bases with a share of G and C."""
    bases = "".join(RANDOM.choice(list("ACGT"), length, p=[(1 - gc) / 2, gc / 2, gc / 2, (1 - gc) / 2]))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f">drawn\n{bases}\n")


def dna(folder: Path) -> Task:
    """A genome."""
    genome(folder / "x.fa", 0.5)
    return DNA(files=[str(folder)], length=60)


def species(folder: Path) -> Task:
    """Three genomes of other shares of G and C."""
    for name, gc in (("low", 0.25), ("middle", 0.5), ("high", 0.75)):
        genome(folder / f"{name}.fa", gc)
    return Species(folder=str(folder), length=60)


def dna_labels(folder: Path) -> Task:
    """A splice donor has GT in its middle, an acceptor AG."""
    lines = ["sequence,label"]
    for number in range(60):
        bases = RANDOM.choice(list("ACGT"), 40)
        label, middle = (("donor", "GT"), ("acceptor", "AG"), ("neither", "CC"))[number % 3]
        bases[20:22] = list(middle)
        lines.append(f"{''.join(bases)},{label}")
    (folder / "x.csv").write_text("\n".join(lines))
    return DNALabels(table=str(folder / "x.csv"))


def forecast(folder: Path) -> Task:
    """Days and weeks, and what does not repeat."""
    hours = np.arange(1500)
    drift = np.cumsum(RANDOM.normal(size=(1500, 2)), axis=0) * 0.15
    load = 5 + 2 * np.sin(2 * np.pi * hours / 24) + np.sin(2 * np.pi * hours / 168) + drift[:, 0]
    heat = 20 + 3 * np.sin(2 * np.pi * (hours - 6) / 24) + drift[:, 1]
    times = np.datetime64("2024-01-01T00") + hours.astype("timedelta64[h]")
    lines = [f"{time},{a:.3f},{b:.3f}" for time, a, b in zip(times, load, heat)]
    (folder / "x.csv").write_text("\n".join(["date,load,heat", *lines]))
    return Forecast(file=str(folder / "x.csv"), context=120, horizon=24)


def series_labels(folder: Path) -> Task:
    """Cylinder, bell and funnel. Source: Saito (1994), as in the UCR archive."""
    x, y, time = RANDOM.normal(size=(60, 128)) * 0.5, np.arange(60) % 3, np.arange(128)
    for row, kind in zip(x, y):
        start, stop = RANDOM.integers(16, 33), RANDOM.integers(64, 120)
        shape = (1.0, (time - start) / (stop - start), (stop - time) / (stop - start))[kind]
        row += (6 + RANDOM.normal()) * ((start <= time) & (time <= stop)) * shape
    np.savez(folder / "x.npz", x_train=x, y_train=y)
    return SeriesLabels(series=str(folder / "x.npz"))


MAKERS: dict[str, Callable[[Path], Task]] = {
    make.__name__: make
    for make in (
        documents, document_pairs, tokens, audio, audio_tokens, dna, species, dna_labels, forecast, series_labels,
    )
}  # fmt: skip
