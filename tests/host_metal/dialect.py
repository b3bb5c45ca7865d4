"""Whether metal/ is written in words that MLX's own Metal kernels use.

Apple's compilers of macOS 14 to 26 take those kernels every day: a word of Metal
that stands in them is safe, another is a risk that has to be argued.
"""

import functools
import re

from . import build

# Our words that MLX's kernels do not have, and what allows them: sections of the
# Metal Shading Language Specification, version 4 of June 2025. Newer versions may
# number them otherwise.
_BARRIER = '6.9.1, "Threadgroup and SIMD-Group Synchronization Functions"'
EXCEPTIONS = {
    "metal::mem_flags::mem_threadgroup": _BARRIER,
    "metal::threadgroup_barrier": _BARRIER,
    "number with suffix u": '2.1, "Scalar Data Types": a suffix of unsigned literals',
    "packed vector": '2.2.3, "Packed Vector Types": bfloat since Metal 3.1',
}

_SPACES = "device|constant|threadgroup|thread"
_SCALARS = (
    r"(?:bool|char|uchar|short|ushort|int|uint|long|ulong|half|float|bfloat|double"
    r"|size_t|ptrdiff_t|u?int(?:8|16|32|64)_t)(?:[234]\b)?"
)
_KEYWORDS = (
    r"\b(?:alignas|alignof|as_type|asm|auto|break|case|catch|class|const|const_cast"
    r"|constexpr|continue|decltype|default|delete|do|dynamic_cast|else|enum|explicit"
    r"|extern|final|for|friend|goto|if|inline|kernel|mutable|namespace|new|noexcept"
    r"|nullptr|operator|override|private|protected|public|register|reinterpret_cast"
    r"|return|signed|sizeof|static|static_assert|static_cast|struct|switch|template"
    r"|this|thread_local|throw|try|typedef|typeid|typename|union|unsigned|using|virtual"
    r"|void|volatile|wchar_t|while|char8_t|char16_t|char32_t|concept|requires)\b"
)
# What a word is called, and how it is spelled: a group keeps only the spelling.
_WORDS = {
    "scalar type {}": rf"\b({_SCALARS})\b",
    "packed vector{}": rf"\bpacked_{_SCALARS}\b()",
    "type unsigned {}": r"\bunsigned\s+(char|short|int|long)\b",
    "qualifiers {}": rf"((?:\b(?:const|static|inline|constexpr|volatile|{_SPACES})\s+)*"
    rf"\b(?:{_SPACES})\b(?:\s+(?:const|constexpr|volatile|restrict)\b)*)",
    "{}": r"(\bmetal(?:::\w+)+|\bMETAL_\w+)",
    "include {}": r"#\s*include\s*(<[^>]+>)",
    "pragma {}": r"_Pragma\(\s*\"([^\"]+)\"|#\s*pragma\s+([^\n]+)",
    "number with suffix {}": r"\b(?:0[xX][\dA-Fa-f]+|\d+)(u|U|l|L|ul|UL|ull|ULL)\b",
    "real number with suffix {}": r"(?:\d+\.\d*|\.\d+)(?:e[-+]?\d+)?(\w*)",
    "cast {}": r"\b((?:static_cast|as_type)<(?:half|bfloat|float)>)",
    "reinterpret_cast to a {} vector": rf"reinterpret_cast<[^<>]*\b({_SPACES})\s+"
    r"metal::vec<",
    "enum class{}": r"\benum\s+class\b()",
    "typed enum{}": r"\benum\s+(?:class\s+)?\w*\s*:()",
    "untyped enum{}": r"\benum\s+\w+\s*\{()",
    "using-declaration{}": r"\busing\s+(?:typename\s+)?\w*::[\w:]+\s*;()",
    "alias with using{}": r"\busing\s+\w+\s*=()",
    "using namespace {}": r"\busing\s+namespace\s+(metal)\b",
    "full specialization{}": r"\btemplate\s*<\s*>()",
    "if constexpr{}": r"\bif\s+constexpr\b()",
    "lambda{}": r"(?:[=(,]\s*)\[[&=\w\s,]*\]\s*\(()",
    "bit field{}": r"\w+\s+\w+\s*:\s*\d+\s*;()",
    "number as a template parameter: {}": r"[<,]\s*((?:const\s+)?(?:bool|int|uint))\s+"
    r"\w+\s*(?=[,>=])",
    "[[{}]] on a template": r"template\s*<[^;{}()]*>\s*\[\[\s*(kernel)\b",
}


def words(text: str) -> set[str]:
    """The words of Metal in a source, each with its kind."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)
    text = text.replace("\\\n", "\n")
    # MLX's names of Metal's types.
    text = re.sub(r"\bbfloat16_t\b", "bfloat", re.sub(r"\bfloat16_t\b", "half", text))
    found = set(re.findall(_KEYWORDS, text))
    for kind, pattern in _WORDS.items():
        for match in re.finditer(pattern, text):
            spelling = next((group for group in match.groups() if group), "")
            found.add(kind.format(" ".join(spelling.split())))
    for attributes in re.findall(r"\[\[(.*?)\]\]", text, flags=re.DOTALL):
        names = re.sub(r"\((?:[^()]|\([^()]*\))*\)", "()", attributes)
        found |= {f"[[{name.strip()}]]" for name in names.split(",")}
    return found


def for_metal(text: str) -> str:
    """A source without what it has for C++ alone."""
    return re.sub(
        r"(#ifdef __METAL_VERSION__\n.*?)#else\n.*?(#endif)",
        r"\1\2",
        text,
        flags=re.DOTALL,
    )


@functools.cache
def kernels_of_mlx() -> dict[str, str]:
    """The text of each file."""
    folder = build.ROOT / build.fetch_metal_headers() / "mlx/backend/metal/kernels"
    files = folder.rglob("*.h")
    return {str(path.relative_to(folder)): path.read_text() for path in files}


@functools.cache
def corpus() -> frozenset[str]:
    """The words of MLX's kernels."""
    return frozenset().union(*map(words, kernels_of_mlx().values()))


def new_words(*texts: str) -> list[str]:
    """The words of these sources that MLX's kernels do not have."""
    return sorted(set().union(*(words(for_metal(x)) for x in texts)) - corpus())
