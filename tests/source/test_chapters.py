"""The chapters of the compiled core: their order, and shapes that their source must not have. Skipped where there is no source."""

import pathlib
import re

import pytest

SOURCE = pathlib.Path(__file__).resolve().parents[2] / "src" / "coopos"

pytestmark = pytest.mark.skipif(not SOURCE.is_dir(), reason="the package's source is not beside the tests")

CONTENTS = (SOURCE / "_core.pyx").read_text() if SOURCE.is_dir() else ""
#: In the order in which they are included, from the bottom up.
CHAPTERS = re.findall(r'^include "_core/(\w+)\.pxi"$', CONTENTS, re.MULTILINE)
each_chapter = pytest.mark.parametrize("chapter", CHAPTERS)
CYTHON = ["_core.pyx", "_posix.pxd", *(f"_core/{chapter}.pxi" for chapter in CHAPTERS)]
each_cython_file = pytest.mark.parametrize("name", CYTHON)

#: The aim is 500; what is longer says so here, with its limit.
LONG = {"sets": 660, "files": 560, "children": 550, "workers": 540}

DEFINITION = re.compile(
    r"""^(?:
        def[ ](\w+) | class[ ](\w+) | cdef[ ]class[ ](\w+)(?=[^\n]*:) | cdef[ ]struct[ ](\w+)
        | cdef[ ](?:inline[ ])?[\w *]*?(\w+)\(        # a function
        | cdef[ ]\w+[ ]\**(\w+)[ ]*(?:=|$)            # a variable of C
        | (\w+)[ ]=                                   # one of Python
    )""",
    re.MULTILINE | re.VERBOSE,
)


def text_of(chapter):
    return (SOURCE / "_core" / f"{chapter}.pxi").read_text()


def code_of(text):
    """Without strings and comments."""
    text = re.sub(r'"""[\s\S]*?"""', "", text)
    text = re.sub(r"#.*", "", text)
    return re.sub(r""""(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'""", '""', text)


def defined_in(code):
    names = {name for match in DEFINITION.finditer(code) for name in match.groups() if name}
    for members in re.findall(r"^cdef enum[^\n]*:\n((?: {4}.*\n|\n)+)", code, re.MULTILINE):
        names |= set(re.findall(r"^ {4}(\w+)", members, re.MULTILINE))
    return names


def free_names(block):
    """What a function or class names, less what it binds itself: variables, parameters, methods."""
    bound = set(re.findall(r"\b(\w+)\s*(?:=(?!=)|\bin\b)|\b(?:as|for) (\w+)", block))
    bound = {name for pair in bound for name in pair}
    bound |= set(re.findall(r"\bcdef [^\n(]*?(\w+)(?=$|,|\s*=)", block, re.MULTILINE))
    bound |= set(re.findall(r"^\s+(?:cdef|def)\b[^\n(]*?(\w+)\(", block, re.MULTILINE))
    for parameters in re.findall(r"^\s*(?:cdef|def)\b[^\n]*\(([^)]*)\)", block, re.MULTILINE):
        bound |= set(re.findall(r"(\w+)\s*(?:,|=|$)", parameters))
    return set(re.findall(r"(?<![\w.])([A-Za-z_]\w*)", block)) - bound


def forward_references(codes):
    """Of {chapter: code}, in order: (chapter, name, the later chapter that defines it)."""
    chapters = list(codes)
    found = []
    for number, chapter in enumerate(chapters):
        later = {name: other for other in chapters[number + 1 :] for name in defined_in(codes[other])}
        for block in re.split(r"\n(?=\S)", codes[chapter]):
            found += [(chapter, name, later[name]) for name in sorted(free_names(block) & set(later))]
    return found


def test_contents_include_every_chapter():
    assert sorted(CHAPTERS) == sorted(path.stem for path in (SOURCE / "_core").glob("*.pxi"))
    listed = re.findall(r"^    (\w+)  +\S", CONTENTS.split('"""')[1], re.MULTILINE)
    assert listed == CHAPTERS


def test_chapter_names_nothing_that_a_later_one_defines():
    assert forward_references({chapter: code_of(text_of(chapter)) for chapter in CHAPTERS}) == []


def test_forward_reference_would_be_found():
    codes = {
        "first": "cdef int early(int fd) except -1:\n    return late(fd)\n\n\ncdef class Early:\n    cdef Late other\n",
        "second": "cdef int late(int fd) except -1:\n    return early(fd)\n\n\ncdef class Late:\n    cdef Early other\n",
    }
    assert forward_references(codes) == [("first", "late", "second"), ("first", "Late", "second")]
    codes["first"] = "cdef int early() except -1:\n    late = 1\n    return late\n"
    assert forward_references(codes) == []


@each_chapter
def test_chapter_opens_with_its_role(chapter):
    assert re.match(r"(# .+\n|#\n)+\n", text_of(chapter))


@each_chapter
def test_chapter_is_of_a_length_that_can_be_read(chapter):
    assert len(text_of(chapter).splitlines()) <= LONG.get(chapter, 500)


@each_chapter
def test_chapter_imports_nothing(chapter):
    """All imports stand on the page of contents."""
    assert not re.search(r"^\s*(?:from \S+ )?c?import ", code_of(text_of(chapter)), re.MULTILINE)


@each_cython_file
def test_cython_source_has_no_compile_time_names(name):
    text = (SOURCE / name).read_text()
    assert not re.search(r"^\s*(DEF|IF|ELIF|ELSE)\b", text, re.MULTILINE)
    assert name == "_core.pyx" or not re.search(r'^\s*include\s+["\']', text, re.MULTILINE)


@each_cython_file
def test_cython_source_says_nothing_to_distutils(name):
    """A line of macros there silently replaces those of setup.py."""
    assert not re.search(r"^#\s*(distutils|cython)\s*:", (SOURCE / name).read_text(), re.MULTILINE)


@each_cython_file
def test_cython_source_asks_for_no_platforms_name(name):
    """What differs is asked of a name in os or of an int in c/system.h."""
    assert not re.search(r"sys\.platform|os\.name\b|platform\.\w+\(|os\.uname", (SOURCE / name).read_text())


@each_chapter
def test_cdef_functions_say_how_they_raise(chapter):
    """One that returns an object can't do otherwise."""
    pattern = r"^[ \t]*cdef[ \t]+(?!class\b)(?:inline[ \t]+)?([\w ]+?[ *]+)(\w+)\(([^()]*(?:\([^()]*\)[^()]*)*)\)([^\n]*):[ \t]*$"
    classes = {found for other in CHAPTERS for found in re.findall(r"^cdef class (\w+)", text_of(other), re.MULTILINE)}
    objects = {"object", "bytes", "dict", "list", "tuple", "str", *classes}
    silent = [
        function
        for kind, function, _arguments, tail in re.findall(pattern, text_of(chapter), re.MULTILINE)
        if kind.strip() not in objects and not re.search(r"\b(except|noexcept)\b", tail)
    ]
    assert silent == []


def test_c_functions_are_declared_without_the_gil():
    """But for those of the interpreter itself, and what goes through its objects."""
    blocks = re.findall(r'^cdef extern from "([^"]+)"(.*):$', (SOURCE / "_posix.pxd").read_text(), re.MULTILINE)
    assert blocks
    interpreters = ("Python.h", "greenlet.h", "c/greenlets.h")
    assert [header for header, tail in blocks if header not in interpreters and "nogil" not in tail] == []


def test_only_system_h_asks_the_preprocessor_for_a_platform():
    asking = [
        path.name
        for path in SOURCE.rglob("*")
        if path.suffix in (".h", ".pxd", ".pxi", ".pyx") and re.search(r"__linux__|__APPLE__|__FreeBSD__|_WIN32", path.read_text())
    ]
    assert asking == ["system.h"]


def test_drawings_for_contributors_name_what_is_there():
    """Methods and chapters in the timelines, and each chapter and header in the drawing of the folders."""
    text = (SOURCE.parents[1] / ".github" / "CONTRIBUTING.md").read_text()
    everything = CONTENTS + "".join(text_of(chapter) for chapter in CHAPTERS)
    methods = re.findall(r"\b(Set|Wait|Watch|Child)\.(\w+)", text)
    assert len(methods) > 5
    for owner, method in methods:
        assert re.search(rf"^cdef class {owner}\b", everything, re.MULTILINE)
        assert re.search(rf"^    (?:cdef|def) [^\n]*\b{method}\(", everything, re.MULTILINE), f"{owner}.{method}"
    assert re.findall(r"^\u2502   [\u251c\u2514]\u2500\u2500 (\w+)\.pxi ", text, re.MULTILINE) == CHAPTERS
    assert [path.name for path in (SOURCE / "c").glob("*.h") if path.name not in text] == []
