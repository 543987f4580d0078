/* Scanner of JSON text of trace events into columns of numbers, without Python.h.
 *
 * It follows the grammar of JSON strictly. Text that it may not read exactly as the scanner in Python does is left to
 * that scanner: an unusual object becomes a row in `unsure`, with its range in the text; at text that is broken, cut off,
 * or nested deeply the scan stops and returns its position.
 *
 * The text must be followed by a byte 0, as in a Python bytes object.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "json_text.h"
#include "name_table.h"
#include "times.h"

#define NO_TIME INT64_MIN
#define MAX_KEYS 32
#define PLACES 16 /* keys of an object that are expected where objects before had them */
#define WAYS 2    /* keys that are expected at a place */

enum status { AT_END, CUT_OFF, BROKEN, CLOSED, FULL, DEEP };
enum kind { MISSING, INTEGER, FLOAT, TEXT };
enum column { NAME, CAT, PID, TID, ID, COLUMNS };
enum field { OTHER, TS, DUR, PH, ARGS, ID2, LABELS }; /* from LABELS on: the columns */

/* A key as written, and what it means. Tracers write the same keys in the same order.
 *
 * The text is all that is between the values: from the comma (or the brace) in front of the key to the value.
 */
typedef struct {
    uint64_t text[4], mask[4];
    uint32_t length; /* 0: none is expected, and the words equal no text */
    uint32_t meaning;
} expected_key;

typedef struct {
    name_table names;
    uint32_t keys;
    slice key[MAX_KEYS];
    uint8_t *key_text;
    int32_t wanted; /* number of names of metadata that are of interest; -1: all are */
    slice wanted_name[MAX_KEYS];
    uint32_t last[COLUMNS]; /* number of the text that each column had last */
    expected_key of_event[PLACES][WAYS], of_args[PLACES][WAYS];
} scanner;

/* Output of traceml_scan; the caller owns the arrays, of `capacity` rows each. */
typedef struct {
    uint8_t *ph;
    int32_t *name, *cat, *pid, *tid, *id;
    int64_t *ts_ns, *dur_ns;
    uint8_t *arg_kinds; /* a block of `capacity` rows per key, like the following three */
    int64_t *arg_integers;
    double *arg_floats;
    int32_t *arg_texts;
    int64_t *unsure; /* three numbers each: row, begin and end in the text */
    int64_t capacity, unsure_capacity;
    int64_t rows, unsure_rows, stop, fractional;
} columns;

typedef struct {
    uint8_t kind;
    int64_t integer;
    double number;
    slice text;
} arg;

typedef struct {
    uint8_t ph;
    int fractional, unusual_id;
    slice labels[COLUMNS];
    int64_t ts_ns, dur_ns;
    arg args[MAX_KEYS];
} event;

/* A text or an integer to intern. */
static int take_label(cursor *c, slice *label) {
    int escaped;
    if (*c->p == '"') {
        c->p++;
        return take_string(c, label, &escaped);
    }

    if (!is_digit(*c->p) && *c->p != '-') return c->unsure = 1, skip_value(c);

    number n;
    const uint8_t *start = c->p, *p = skip_small(start, c->end);
    if (p) {
        *label = (slice){start, (uint32_t)(p - start), 'n'};
        c->p = p;
        return OK;
    }

    p = skip_digits(start, c->end);
    if (p > start && (*start != '0' || p == start + 1) && p - start <= MAX_DIGITS && p < c->end && *p != '.' &&
        (*p | 32) != 'e') {
        *label = (slice){start, (uint32_t)(p - start), 'n'};
        c->p = p;
        return OK;
    }

    int outcome = take_number(c, &n);
    if (outcome) return outcome;
    if (n.point || n.exponent || (n.negative && *n.at == '0')) c->unsure = 1;

    *label = (slice){start, (uint32_t)(n.end - start), 'n'};
    if (n.end - start > MAX_DIGITS) c->unsure = 1;
    return OK;
}

#define METADATA 'M'
#define INTEGER_KINDS "1X3A4M" /* dftracer's numbers, each with its letter behind it */

static int take_kind(cursor *c, event *e) {
    slice text = {0};
    int escaped = 0;
    if (*c->p == '"') {
        c->p++;
        if (*c->p > 0x20 && *c->p < 0x7F && *c->p != '"' && *c->p != '\\' && c->p[1] == '"')
            return e->ph = *c->p, c->p += 2, OK;

        int outcome = take_string(c, &text, &escaped);
        if (outcome) return outcome;
        if (text.length == 1 && *text.at > 0x20 && *text.at < 0x7F) e->ph = *text.at;
        else c->unsure = 1;
        return OK;
    }

    const char *number = is_digit(*c->p) ? memchr(INTEGER_KINDS, *c->p, sizeof INTEGER_KINDS - 1) : NULL;
    if (number && (c->p[1] == ',' || c->p[1] == '}')) return c->p++, e->ph = (uint8_t)number[1], OK;

    c->unsure = 1;
    return skip_value(c);
}

static int take_arg(cursor *c, arg *a) {
    static const double tens[] = {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,  1e8,  1e9,  1e10, 1e11,
                                  1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22};
    int escaped;
    number n;
    a->kind = MISSING;
    if (*c->p == '"') {
        c->p++;
        a->kind = TEXT;
        return take_string(c, &a->text, &escaped);
    }

    if (!is_digit(*c->p) && *c->p != '-') return c->unsure = 1, skip_value(c);

    int outcome = take_number(c, &n);
    if (outcome) return outcome;

    int64_t value = 0, digits = 0, decimals = 0;
    for (const uint8_t *p = n.at; p < n.end; p++) {
        if (*p == '.') continue;
        if (n.exponent || ++digits > MAX_DIGITS) return c->unsure = 1, OK;
        value = value * 10 + (*p - '0');
        decimals += n.point && p >= n.point;
    }

    /* an integer below 2^53 divided by a power of ten up to 10^22 is rounded correctly; others are for Python */
    if (n.point && (value > (1ll << 53) || decimals > 22)) return c->unsure = 1, OK;

    a->kind = n.point ? FLOAT : INTEGER;
    a->integer = n.point ? 0 : n.negative ? -value : value;
    a->number = n.point ? (double)value / tens[decimals] : (double)value;
    if (n.negative && (n.point || value)) a->number = -a->number;
    return OK;
}

/* A key and its colon. */
static int take_key(cursor *c, slice *key, int *escaped) {
    int outcome;
    if (*c->p != '"') return ended(c, c->p);
    c->p++;
    if ((outcome = take_string(c, key, escaped))) return outcome;
    c->p = skip_space(c->p);
    if (*c->p != ':') return ended(c, c->p);
    c->p++;
    return OK;
}

/* Whether bytes differ from the words of a key `first` and the next. */
static inline uint64_t differ(const uint8_t *p, const expected_key *key, int first) {
    uint64_t one, two;
    memcpy(&one, p + 8 * first, 8);
    memcpy(&two, p + 8 * first + 8, 8);
    return ((one ^ key->text[first]) & key->mask[first]) | ((two ^ key->text[first + 1]) & key->mask[first + 1]);
}

static inline int is_expected(const cursor *c, const expected_key *key) {
    if (c->end - c->p < (int64_t)sizeof key->text || differ(c->p, key, 0)) return 0;
    return key->length <= 16 || !differ(c->p, key, 2);
}

static void expect_none(expected_key *key) {
    *key = (expected_key){.text = {~0ull}, .mask = {~0ull}};
}

static void expect(expected_key *key, const uint8_t *text, const uint8_t *end) {
    expect_none(key);
    if (end - text > (int64_t)sizeof key->text) return;

    key->length = (uint32_t)(end - text);
    memset(key->mask, 0, sizeof key->mask);
    memset(key->mask, 0xFF, key->length);
    memset(key->text, 0, sizeof key->text);
    memcpy(key->text, text, key->length);
}

static uint32_t field_of(slice key) {
    static const struct { const char *name; uint32_t field; } others[] = {
        {"ts", TS}, {"dur", DUR}, {"ph", PH}, {"args", ARGS}, {"id2", ID2}, {"name", LABELS + NAME},
        {"cat", LABELS + CAT}, {"pid", LABELS + PID}, {"tid", LABELS + TID}, {"id", LABELS + ID}};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        if (key.length == strlen(others[i].name) && !memcmp(key.at, others[i].name, key.length)) return others[i].field;

    return OTHER;
}

/* Number of a wanted key of args; `keys` for another. */
static uint32_t wanted_key(const scanner *s, slice key) {
    uint32_t k = 0;
    while (k < s->keys && (s->key[k].length != key.length || memcmp(s->key[k].at, key.at, key.length))) k++;
    return k;
}

/* A member that was not expected, up to its value; it is from now on, unless Python has to read its key. */
static int take_other_member(cursor *c, scanner *s, expected_key *place, int of_args, int first) {
    slice key;
    int escaped, outcome;
    const uint8_t *start = c->p;
    c->p = skip_space(start);
    if (*c->p == '}') return c->p++, OVER;
    if (*c->p != (first ? '{' : ',')) return ended(c, c->p);

    c->p = skip_space(c->p + 1);
    if (first && *c->p == '}') return c->p++, OVER;
    if ((outcome = take_key(c, &key, &escaped))) return outcome;
    if (escaped && (s->keys || !of_args)) c->unsure = 1;

    c->p = skip_space(c->p);
    memmove(place + 1, place, sizeof *place * (WAYS - 1));
    if (escaped) expect_none(place);
    else expect(place, start, c->p);
    place->meaning = of_args ? wanted_key(s, key) : field_of(key);
    return OK;
}

/* A member up to its value, at a place of an event or of its args, with what it means; OVER at the end of the object.
 *
 * The cursor is behind the member before, or at the brace in front of the first one.
 */
static inline int take_member(cursor *c, scanner *s, expected_key *place, int of_args, int first, uint32_t *meaning) {
    if (*c->p == '}') return c->p++, OVER;

    for (int way = 0; way < WAYS; way++) {
        if (is_expected(c, &place[way])) {
            c->p = skip_space(c->p + place[way].length);
            *meaning = place[way].meaning;
            return OK;
        }
    }

    int outcome = take_other_member(c, s, place, of_args, first);
    *meaning = place->meaning;
    return outcome;
}

static inline int skip_member(cursor *c) {
    slice text;
    int escaped;
    if (*c->p == '"') return c->p++, take_string(c, &text, &escaped);

    const uint8_t *end = skip_small(c->p, c->end);
    return end ? (c->p = end, OK) : skip_value(c);
}

static int take_args(cursor *c, event *e, scanner *s) {
    for (uint32_t k = 0; k < s->keys; k++) e->args[k].kind = MISSING; /* a second `args` replaces the first */

    if (*c->p != '{') return skip_value(c);

    for (uint32_t at = 0;; at++) {
        uint32_t k;
        int outcome = take_member(c, s, s->of_args[at % PLACES], 1, !at, &k);
        if (outcome) return outcome == OVER ? OK : outcome;

        outcome = k < s->keys ? take_arg(c, &e->args[k]) : skip_member(c);
        if (outcome) return outcome;
    }
}

/* Phase codes that use the id: for others an unusual id does not matter. */
static int take_id(cursor *c, event *e) {
    int before = c->unsure, outcome = take_label(c, &e->labels[ID]);
    if (c->unsure != before) e->unusual_id = 1;
    c->unsure = before;
    return outcome;
}

static inline int take_value(cursor *c, event *e, scanner *s, uint32_t field) {
    switch (field) {
    case TS: return take_time(c, &e->ts_ns, &e->fractional);
    case DUR: return take_time(c, &e->dur_ns, &e->fractional);
    case PH: return take_kind(c, e);
    case ARGS: return take_args(c, e, s);
    case LABELS + ID: return take_id(c, e);
    case ID2: e->unusual_id = 1; /* fall through */
    case OTHER: return skip_member(c);
    default: return take_label(c, &e->labels[field - LABELS]);
    }
}

static int take_event(cursor *c, event *e, scanner *s) {
    e->ph = 0, e->fractional = e->unusual_id = 0;
    for (int k = 0; k < COLUMNS; k++) e->labels[k].tag = 0;
    for (uint32_t k = 0; k < s->keys; k++) e->args[k].kind = MISSING;
    e->ts_ns = NO_TIME, e->dur_ns = -1;
    c->unsure = 0;
    if (*c->p != '{') return BAD;

    for (uint32_t at = 0;; at++) {
        uint32_t field;
        int outcome = take_member(c, s, s->of_event[at % PLACES], 0, !at, &field);
        if (outcome) return outcome == OVER ? OK : outcome;
        if ((outcome = take_value(c, e, s, field))) return outcome;
    }
}

/* Number of a text of a column, in which that of the row before is likely. */
static inline int32_t intern_in(scanner *s, enum column column, slice text, const uint8_t *end) {
    const entry *last = &s->names.entries[s->last[column]];
    if (text.tag && is_text(&s->names, last, text, word_at(text.at, text.length, end))) return (int32_t)s->last[column];

    int32_t number = intern(&s->names, text, end);
    if (number >= 0) s->last[column] = (uint32_t)number;
    return number;
}

static inline int has_identity(uint8_t ph) {
    return ph != 'X' && ph && strchr("bensftNODSTpF", ph) != NULL;
}

static int put_row(scanner *s, columns *out, const event *e, const uint8_t *end) {
    int64_t row = out->rows;
    int32_t name = out->name[row] = intern_in(s, NAME, e->labels[NAME], end);
    int32_t cat = out->cat[row] = intern_in(s, CAT, e->labels[CAT], end);
    int32_t pid = out->pid[row] = intern_in(s, PID, e->labels[PID], end);
    int32_t tid = out->tid[row] = intern_in(s, TID, e->labels[TID], end);
    int32_t id = out->id[row] = has_identity(e->ph) ? intern_in(s, ID, e->labels[ID], end) : -1;
    int short_of_memory = name == -2 || cat == -2 || pid == -2 || tid == -2 || id == -2;
    out->ph[row] = e->ph;
    out->ts_ns[row] = e->ts_ns, out->dur_ns[row] = e->dur_ns;
    out->fractional |= e->fractional;
    for (uint32_t k = 0; k < s->keys; k++) {
        const arg *a = &e->args[k];
        int64_t at = (int64_t)k * out->capacity + row;
        out->arg_kinds[at] = a->kind;
        out->arg_integers[at] = a->kind == INTEGER ? a->integer : 0;
        out->arg_floats[at] = a->kind == INTEGER || a->kind == FLOAT ? a->number : __builtin_nan("");
        out->arg_texts[at] = a->kind == TEXT ? intern(&s->names, a->text, end) : -1;
        short_of_memory |= out->arg_texts[at] == -2;
    }

    return !short_of_memory;
}

/* Whether metadata has a wanted name, or one with escapes, which may be equal to one. */
static int is_wanted(const scanner *s, slice name) {
    if (s->wanted < 0) return 1;
    if (name.tag != 's') return 0;

    for (int32_t w = 0; w < s->wanted; w++)
        if (s->wanted_name[w].length == name.length && !memcmp(s->wanted_name[w].at, name.at, name.length)) return 1;

    return memchr(name.at, '\\', name.length) != NULL;
}

static void put_unsure(scanner *s, columns *out, int64_t start, int64_t stop) {
    event nothing;
    memset(&nothing, 0, offsetof(event, args));
    for (uint32_t k = 0; k < s->keys; k++) nothing.args[k].kind = MISSING;
    put_row(s, out, &nothing, NULL);
    int64_t *at = out->unsure + 3 * out->unsure_rows++;
    at[0] = out->rows, at[1] = start, at[2] = stop;
}

/* ---- functions called from Python ---- */

void traceml_scanner_free(scanner *s) {
    if (!s) return;
    free(s->names.entries), free(s->names.slots), free(s->names.arena), free(s->key_text), free(s);
}

/* Texts that are zero-terminated, one after another, as slices; returns the end. */
static const uint8_t *take_texts(const uint8_t *at, slice *out, int32_t count) {
    for (int32_t i = 0; i < count; i++) {
        uint32_t size = (uint32_t)strlen((const char *)at);
        out[i] = (slice){at, size, 's'};
        at += size + 1;
    }

    return at;
}

/* Create a scanner.
 *
 * `texts` are zero-terminated, one after another: `keys` of args, and `wanted` names of metadata (-1: any name).
 */
scanner *traceml_scanner_new(const char *texts, int64_t length, int32_t keys, int32_t wanted) {
    scanner *s = calloc(1, sizeof *s);
    if (!s || keys > MAX_KEYS || wanted > MAX_KEYS) return free(s), NULL;

    name_table *names = &s->names;
    names->capacity = 1024, names->mask = 4095, names->arena_size = 1 << 16;
    names->entries = calloc(names->capacity, sizeof(entry)); /* `last` of a column refers to the first before there is one */
    names->slots = calloc((size_t)names->mask + 1, sizeof(uint32_t));
    names->arena = malloc(names->arena_size);
    s->key_text = malloc((size_t)length + 1);
    if (!names->entries || !names->slots || !names->arena || !s->key_text) return traceml_scanner_free(s), NULL;

    memcpy(s->key_text, texts, (size_t)length);
    take_texts(take_texts(s->key_text, s->key, keys), s->wanted_name, wanted);
    s->keys = (uint32_t)keys, s->wanted = wanted;
    for (int at = 0; at < PLACES; at++)
        for (int way = 0; way < WAYS; way++) expect_none(&s->of_event[at][way]), expect_none(&s->of_args[at][way]);

    return s;
}

int32_t traceml_scanner_count(const scanner *s) { return (int32_t)s->names.count; }

/* Texts from a number on, one after another, each after its tag; `ends` are offsets from the returned address. */
const uint8_t *traceml_scanner_texts(const scanner *s, int32_t first, int64_t *ends) {
    const entry *known = s->names.entries;
    for (uint32_t i = (uint32_t)first; i < s->names.count; i++)
        ends[i - (uint32_t)first] = (int64_t)(known[i].at - known[first].at + (known[i].shape >> 8) + 1);

    return s->names.arena + known[first].at;
}

static void copy_numbers(int64_t rows, const int32_t *numbers, const int32_t *from, int32_t *to) {
    for (int64_t i = 0; i < rows; i++) to[i] = from[i] < 0 ? -1 : numbers[from[i]];
}

/* Copy the rows of a scan behind the rows of `to`, with other numbers in place of those of texts. */
void traceml_copy_rows(const scanner *s, const columns *from, columns *to, const int32_t *numbers) {
    int64_t rows = from->rows, at = to->rows;
    memcpy(to->ph + at, from->ph, (size_t)rows);
    copy_numbers(rows, numbers, from->name, to->name + at);
    copy_numbers(rows, numbers, from->cat, to->cat + at);
    copy_numbers(rows, numbers, from->pid, to->pid + at);
    copy_numbers(rows, numbers, from->tid, to->tid + at);
    copy_numbers(rows, numbers, from->id, to->id + at);
    memcpy(to->ts_ns + at, from->ts_ns, (size_t)rows * sizeof *to->ts_ns);
    memcpy(to->dur_ns + at, from->dur_ns, (size_t)rows * sizeof *to->dur_ns);
    for (uint32_t k = 0; k < s->keys; k++) {
        int64_t here = (int64_t)k * from->capacity, there = (int64_t)k * to->capacity + at;
        memcpy(to->arg_kinds + there, from->arg_kinds + here, (size_t)rows);
        memcpy(to->arg_integers + there, from->arg_integers + here, (size_t)rows * sizeof *to->arg_integers);
        memcpy(to->arg_floats + there, from->arg_floats + here, (size_t)rows * sizeof *to->arg_floats);
        copy_numbers(rows, numbers, from->arg_texts + here, to->arg_texts + there);
    }
}

/* Read events from `start` on; append them to the rows of `out`. */
int32_t traceml_scan(scanner *s, const uint8_t *text, int64_t start, int64_t end, int32_t wrapped, int32_t decimals,
                columns *out) {
    cursor c = {text + start, text + end, 0, decimals};
    event e;
    if (end - start > UINT32_MAX) return out->stop = start, DEEP;

    for (;;) {
        for (;; c.p++) {
            uint8_t b = *c.p;
            if (b == ' ' || b == '\n' || b == '\r' || b == '\t' || b == '\f' || b == '\v' || b == ',') continue;
            if (!wrapped && (b == '[' || b == ']')) continue;
            break;
        }

        out->stop = c.p - text;
        if (c.p >= c.end) return AT_END;
        if (wrapped && *c.p == ']') return CLOSED;
        if (out->rows == out->capacity || out->unsure_rows == out->unsure_capacity) return FULL;

        int outcome = take_event(&c, &e, s);
        if (outcome) return outcome == CUT ? CUT_OFF : outcome == BAD ? BROKEN : DEEP;

        if (c.unsure || !e.ph || (e.unusual_id && has_identity(e.ph)))
            put_unsure(s, out, out->stop, c.p - text);
        else if (e.ph != METADATA) {
            if (!put_row(s, out, &e, c.end)) return DEEP;
        } else if (is_wanted(s, e.labels[NAME])) {
            put_unsure(s, out, out->stop, c.p - text);
        } else {
            continue;
        }

        out->rows++;
    }
}
