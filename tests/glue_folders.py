"""A small, hostile copy of every GLUE task as GLUE ships it: byte-order marks, CRLF, lone quotes, broken lines, no last
newline. Each training split has three good examples, every other split two."""

BOM, CRLF = "\ufeff", "\r\n"


def lines(*rows, end="\n", last=True):
    """Tab-separated lines; `last`: whether the last one ends with a newline."""
    return end.join("\t".join(row.split("|")) for row in rows) + (end if last else "")


def put(folder, **files):
    """Writes files; in their names `__` is a dot."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content.encode())
    return str(folder)


MNLI_PARSES = "sentence1_binary_parse|sentence2_binary_parse|sentence1_parse|sentence2_parse"
MNLI_HEAD = f"index|promptID|pairID|genre|{MNLI_PARSES}|sentence1|sentence2"
MNLI_ROW = "{0}|31|31n|fiction|( a|( b|(ROOT|(ROOT|{1}|{2}"


def mnli(*rows, labels=1, **options):
    """An MNLI file of (premise, hypothesis, gold label); without labels where there is none."""
    head = "|".join([MNLI_HEAD, *(f"label{i + 1}" for i in range(labels)), *(["gold_label"] if labels else [])])
    body = ["|".join([MNLI_ROW.format(i, *row[:2]), *row[2:] * (labels + 1)]) for i, row in enumerate(rows)]
    return lines(head, *body, **options)


FOLDERS = {
    "cola": {
        "train__tsv": BOM + lines('gj04|1||"Half a quote', "gj04|0|*|Him ran.", "bc01|1||Say so.", end=CRLF),
        "dev__tsv": lines("bc01|0|*|sentence label index", "bc01|1||Fine.", last=False),
        "test__tsv": lines("index|sentence", "0|Bill whistled.", '1|The "cat'),
    },
    "sst2": {
        "train__tsv": BOM + lines("sentence|label", 'a "lone quote|1', "dull|0", "fine \r fine|1", end=CRLF),
        "dev__tsv": lines("sentence|label", "so so|0", "good|1", last=False),
        "test__tsv": lines("index|sentence", "0|who knows", "1|not I"),
    },
    "mrpc": {
        "train__tsv": BOM + lines("Quality|#1 ID|#2 ID|#1 String|#2 String", '1|1|2|"He said|He said"', "0|3|4|a|b", "1|5|6|c|d"),
        "dev__tsv": lines("Quality|#1 ID|#2 ID|#1 String|#2 String", '0|7|8|x"|y', "1|9|10|p|q", end=CRLF),
        "test__tsv": BOM + lines("index|#1 ID|#2 ID|#1 String|#2 String", "0|1|2|u|v", "1|3|4|w|z", last=False),
    },
    "qqp": {
        "train__tsv": lines(
            "id|qid1|qid2|question1|question2|is_duplicate",
            '1|1|2|What is a "tab?|What?|0', "2|3|4|A question with a", "newline?|Another?|1", "3|||||0", "4|7|8|Why?|Why so?|1",
            "5|9|10|When?|Now?|0",
        ),
        "dev__tsv": lines("id|qid1|qid2|question1|question2|is_duplicate", "1|1|2|a|b|0", "2|3|4|c|d|1", end=CRLF),
        "test__tsv": lines("id|question1|question2", "0|Who?|Whom?", "1|Is it?|It is?", last=False),
    },
    "stsb": {
        "train__tsv": lines("index|genre|filename|year|old_index|source1|source2|sentence1|sentence2|score",
                            '0|news|M|2012|1|none|none|A "plane.|A bird.|0.000', "1|n|M|2012|5|none|none|A man.|A boy.|5.000", "2|n|M|2012|6|none|none|x|y|2.500"),
        "dev__tsv": lines("index|genre|filename|year|old_index|source1|source2|sentence1|sentence2|score",
                          "0|n|M|2012|1|none|none|a|b|1.25", "1|n|M|2012|1|none|none|c|d|4", end=CRLF),
        "test__tsv": lines("index|genre|filename|year|old_index|source1|source2|sentence1|sentence2",
                           "0|n|M|2012|1|none|none|e|f", "1|n|M|2012|1|none|none|g|h"),
    },
    "mnli": {
        "train__tsv": mnli(("a", "b", "neutral"), ('"c', "d", "contradiction"), ("e", "f", "-"), ("g", "h", "entailment"), end=CRLF),
        "dev_matched__tsv": mnli(("a", "c", "entailment"), ("b", "c", "neutral"), labels=5),
        "dev_mismatched__tsv": mnli(("m", "n", "-"), ("m", "o", "neutral"), ("m", "p", "contradiction"), labels=5, last=False),
        "test_matched__tsv": mnli(("a", "d"), ("b", "d"), labels=0),
        "test_mismatched__tsv": mnli(("q", "d"), ("r", "d"), labels=0),
        "diagnostic__tsv": lines("index|sentence1|sentence2", "0|s|d", "1|t|d"),
    },
    "qnli": {
        "train__tsv": lines("index|question|sentence|label", '0|Who "?|He.|entailment', "1|What?|It.|not_entailment", "2|a|b|entailment", end=CRLF),
        "dev__tsv": BOM + lines("index|question|sentence|label", "0|a?|c|entailment", "1|a?|d|not_entailment", last=False),
        "test__tsv": lines("index|question|sentence", "0|a?|e", "1|a?|f"),
    },
    "rte": {
        "train__tsv": lines("index|sentence1|sentence2|label", '0|"No|Yes|not_entailment', "1|c|d|entailment", "2|e|f|entailment"),
        "dev__tsv": lines("index|sentence1|sentence2|label", "0|a|c|entailment", "1|a|d|not_entailment"),
        "test__tsv": lines("index|sentence1|sentence2", "0|a|e", "1|a|f", end=CRLF),
    },
    "wnli": {
        "train__tsv": lines("index|sentence1|sentence2|label", "0|The \"sack|It|1", "1|c|d|0", "2|e|f|1"),
        "dev__tsv": lines("index|sentence1|sentence2|label", "0|a|c|0", "1|a|d|1", last=False),
        "test__tsv": BOM + lines("index|sentence1|sentence2", "0|a|e", "1|a|f"),
    },
}  # fmt: skip
