"""The symbols that speech is written in: a table of IPA, and which of its symbols have a sound of their own."""

from __future__ import annotations

PAD, BEGIN, END, UNKNOWN = 0, 1, 2, 3
"""Ids of the symbols that are no sounds; a symbol that the table lacks is UNKNOWN."""

MARKS = ' .,;:!?—()"'
_SUPRASEGMENTALS = "ˈˌːˑ|‖‿↗↘"
_CONSONANTS = "pbtdʈɖcɟkɡqɢʔmɱnɳɲŋɴʙrʀⱱɾɽɸβfvθðszʃʒʂʐçʝxɣχʁħʕhɦɬɮʋɹɻjɰlɭʎʟʘǀǃǂǁɓɗʄɠʛʍwɥʜʢʡɕʑɺɧɫ"
_VOWELS = "iyɨʉɯuɪʏʊeøɘɵɤoəɛœɜɞʌɔæɐaɶɑɒɚɝᵻᵊ"
_DIACRITICS = "ʼʰʲʷˠˤʴ˞\u0303\u0329\u0325\u032f\u032a\u031d\u031e\u031a\u0306\u0308\u0330\u0324\u0361"
_TONES = "˥˦˧˨˩0123456789"

TABLE: tuple[str, ...] = (
    "<pad>", "<begin>", "<end>", "<unknown>",
    *MARKS, *_SUPRASEGMENTALS, *_CONSONANTS, *_VOWELS, *_DIACRITICS, *_TONES,
)  # fmt: skip
"""The symbols by id: pauses, then the chart of the International Phonetic Association (2020), with what espeak-ng writes beyond it
(`ᵻ`, `ᵊ`, `ɫ`, tones as digits). Fixed: data that were made with it name it by its hash."""

PAUSES: tuple[int, ...] = (BEGIN, END, *(TABLE.index(mark) for mark in MARKS))
"""Symbols at which a voice may be silent."""
SILENT: tuple[int, ...] = (PAD, *(TABLE.index(mark) for mark in _SUPRASEGMENTALS + _DIACRITICS + _TONES))
"""Symbols that change what stands beside them and take no time of their own."""
