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

#define NO_TIME INT64_MIN
#define MAX_DEPTH 60
#define MAX_KEYS 32
#define MAX_DIGITS 18 /* digits of a number that always fits in 64 bits */
#define MAX_TIME_LENGTH 60 /* of a time as written; a longer one is for the scanner in Python */
#define MAX_EXPONENT 99

enum status { AT_END, CUT_OFF, BROKEN, CLOSED, FULL, DEEP };
enum kind { MISSING, INTEGER, FLOAT, TEXT };
enum outcome { OK, CUT, BAD, TOO_DEEP };

typedef struct {
    const uint8_t *at;
    uint32_t length;
    uint8_t tag; /* 0 missing, 's' text as written, 'n' integer as written */
} slice;

typedef struct {
    uint64_t hash;
    uint64_t head; /* the first bytes of the text */
    uint64_t at;   /* offset in the arena; the first byte is the tag */
    uint32_t length;
    uint8_t tag;
} entry;

typedef struct {
    entry *entries;
    uint32_t *slots; /* number of an entry + 1 */
    uint8_t *arena;
    uint64_t arena_used, arena_size;
    uint32_t count, capacity, mask;
    uint32_t keys;
    slice key[MAX_KEYS];
    uint8_t *key_text;
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
    const uint8_t *p, *end;
    int unsure;
    int decimals; /* decimals of a time in the text that make it nanoseconds */
} cursor;

typedef struct {
    uint8_t kind;
    int64_t integer;
    double number;
    slice text;
} arg;

typedef struct {
    uint8_t ph;
    int fractional, unusual_id;
    slice name, cat, pid, tid, id;
    int64_t ts_ns, dur_ns;
    arg args[MAX_KEYS];
} event;

/* ---- names and their numbers ---- */

/* Up to eight bytes as a word, missing ones 0; bytes before `end` are readable. */
static inline uint64_t word_at(const uint8_t *p, uint32_t length, const uint8_t *end) {
    uint64_t word = 0;
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    if (end - p >= 8) {
        memcpy(&word, p, 8);
        return length >= 8 ? word : word & ((1ull << (8 * length)) - 1);
    }
#endif
    memcpy(&word, p, length < 8 ? length : 8);
    return word;
}

static inline uint64_t hash_of(const uint8_t *p, uint32_t length, uint8_t tag, uint64_t word, const uint8_t *end) {
    uint64_t h = 0x9E3779B97F4A7C15ull ^ ((uint64_t)length << 8) ^ tag;
    for (;;) {
        h = (h ^ word) * 0xD6E8FEB86659FD93ull;
        h ^= h >> 32;
        if (length <= 8) return h;

        p += 8, length -= 8;
        word = word_at(p, length, end);
    }
}

static int grow(scanner *s) {
    uint32_t capacity = s->capacity * 2, mask = capacity * 2 - 1;
    entry *entries = realloc(s->entries, sizeof(entry) * capacity);
    if (!entries) return 0;

    s->entries = entries;
    uint32_t *slots = calloc((size_t)mask + 1, sizeof(uint32_t));
    if (!slots) return 0;

    for (uint32_t i = 0; i < s->count; i++) {
        uint32_t slot = (uint32_t)entries[i].hash & mask;
        while (slots[slot]) slot = (slot + 1) & mask;
        slots[slot] = i + 1;
    }

    free(s->slots);
    s->slots = slots, s->mask = mask, s->capacity = capacity;
    return 1;
}

/* Number of a text; -1 when it is missing, -2 when memory is exhausted. */
static int32_t intern(scanner *s, slice text, const uint8_t *end) {
    if (!text.tag) return -1;

    uint64_t head = word_at(text.at, text.length, end);
    uint64_t hash = hash_of(text.at, text.length, text.tag, head, end);
    uint32_t slot = (uint32_t)hash & s->mask;
    for (; s->slots[slot]; slot = (slot + 1) & s->mask) {
        const entry *known = &s->entries[s->slots[slot] - 1];
        if (known->hash == hash && known->head == head && known->length == text.length && known->tag == text.tag &&
            (text.length <= 8 || !memcmp(s->arena + known->at + 1, text.at, text.length)))
            return (int32_t)(s->slots[slot] - 1);
    }

    if (s->count == s->capacity) {
        if (!grow(s)) return -2;
        return intern(s, text, end);
    }

    if (s->arena_used + text.length + 1 > s->arena_size) {
        uint64_t size = (s->arena_size + text.length) * 2;
        uint8_t *arena = realloc(s->arena, size);
        if (!arena) return -2;
        s->arena = arena, s->arena_size = size;
    }

    s->entries[s->count] = (entry){hash, head, s->arena_used, text.length, text.tag};
    s->arena[s->arena_used] = text.tag;
    memcpy(s->arena + s->arena_used + 1, text.at, text.length);
    s->arena_used += text.length + 1;
    s->slots[slot] = ++s->count;
    return (int32_t)(s->count - 1);
}

/* ---- JSON ---- */

static inline const uint8_t *skip_space(const uint8_t *p) {
    while (*p == ' ' || *p == '\n' || *p == '\r' || *p == '\t') p++;
    return p;
}

static inline int ended(const cursor *c, const uint8_t *p) { return p >= c->end ? CUT : BAD; }

static inline int is_hex(uint8_t c) {
    return (c >= '0' && c <= '9') || ((c | 32) >= 'a' && (c | 32) <= 'f');
}

#define ONES 0x0101010101010101ull
#define HIGH 0x8080808080808080ull
#define HAS_ZERO(v) (((v) - ONES) & ~(v) & HIGH)

/* Text after its opening quote; moves the cursor past the closing one. */
static inline int take_string(cursor *c, slice *text, int *escaped) {
    const uint8_t *p = c->p;
    text->at = p;
    *escaped = 0;
    for (;;) {
        while (c->end - p >= 8) {
            uint64_t v;
            memcpy(&v, p, 8);
            /* a quote, a backslash, or a byte below 0x20: exact up to the first hit, and only that is used */
            uint64_t hit = HAS_ZERO(v ^ (ONES * '"')) | HAS_ZERO(v ^ (ONES * '\\')) | ((v - ONES * 0x20) & ~v & HIGH);
            if (hit) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
                p += __builtin_ctzll(hit) >> 3;
#endif
                break;
            }
            p += 8;
        }

        while (*p >= 0x20 && *p != '"' && *p != '\\') p++;
        if (*p == '"') break;
        if (*p != '\\') return ended(c, p);

        *escaped = 1;
        uint8_t e = p[1];
        if (e == 'u') {
            for (int i = 2; i < 6; i++)
                if (!is_hex(p[i])) return ended(c, p + i);
            p += 6;
        } else if (e && strchr("\"\\/bfnrt", e)) {
            p += 2;
        } else {
            return ended(c, p + 1);
        }
    }

    if (p - text->at > UINT32_MAX) return BAD;

    text->length = (uint32_t)(p - text->at);
    text->tag = 's';
    c->p = p + 1;
    return OK;
}

static inline int is_digit(uint8_t c) { return (uint8_t)(c - '0') < 10; }

typedef struct {
    const uint8_t *at, *point, *end; /* point: begin of the digits of the fraction, NULL without one */
    const uint8_t *exponent;         /* behind the letter e, NULL without one */
    int negative;
} number;

static inline int take_number(cursor *c, number *n) {
    const uint8_t *p = c->p;
    n->negative = *p == '-', n->exponent = n->point = NULL;
    p += n->negative;
    n->at = p;
    if (*p == 'I' || *p == 'N') return TOO_DEEP; /* Infinity or NaN: for the scanner in Python */
    if (!is_digit(*p)) return ended(c, p);

    p += *p == '0';
    if (p == n->at) while (is_digit(*p)) p++;
    n->end = p;
    if (*p == '.') {
        n->point = ++p;
        if (!is_digit(*p)) return ended(c, p);
        while (is_digit(*p)) p++;
        n->end = p;
    }

    if ((*p | 32) == 'e') {
        n->exponent = ++p;
        p += *p == '+' || *p == '-';
        if (!is_digit(*p)) return ended(c, p);
        while (is_digit(*p)) p++;
        n->end = p;
    }

    c->p = p;
    return p >= c->end ? CUT : OK; /* the next chunk may contain more digits */
}

static inline int take_word(cursor *c) {
    static const char *words[] = {"true", "false", "null"};
    for (int w = 0; w < 3; w++) {
        size_t length = strlen(words[w]);
        if (*c->p == words[w][0]) {
            for (size_t i = 0; i < length; i++)
                if (c->p[i] != words[w][i]) return ended(c, c->p + i);
            c->p += length;
            return OK;
        }
    }

    return *c->p == 'N' || *c->p == 'I' ? TOO_DEEP : ended(c, c->p);
}

static inline int skip_scalar(cursor *c) {
    slice text;
    number n;
    int escaped;
    if (*c->p == '"') return c->p++, take_string(c, &text, &escaped);
    if (*c->p == '-' || is_digit(*c->p)) return take_number(c, &n);
    return take_word(c);
}

/* Any value, from its first byte. */
static int skip_value(cursor *c) {
    uint64_t objects = 0; /* one bit per level: whether it is an object */
    int depth = 0, outcome;
    for (;;) {
        uint8_t first = *c->p;
        if (first == '{' || first == '[') {
            if (++depth > MAX_DEPTH) return TOO_DEEP;
            objects = objects << 1 | (first == '{');
            c->p = skip_space(c->p + 1);
            if (*c->p == (first == '{' ? '}' : ']')) goto closing;
            goto member;
        }

        if ((outcome = skip_scalar(c))) return outcome;
    after:
        if (!depth) return OK;
        c->p = skip_space(c->p);
        if (*c->p == ',') {
            c->p = skip_space(c->p + 1);
            goto member;
        }

        if (*c->p != ((objects & 1) ? '}' : ']')) return ended(c, c->p);
    closing:
        c->p++, depth--, objects >>= 1;
        goto after;
    member:
        if (objects & 1) {
            slice text;
            int escaped;
            if (*c->p != '"') return ended(c, c->p);
            c->p++;
            if ((outcome = take_string(c, &text, &escaped))) return outcome;
            c->p = skip_space(c->p);
            if (*c->p != ':') return ended(c, c->p);
            c->p = skip_space(c->p + 1);
        }
    }
}

/* ---- an event ---- */

/* Value of an exponent; more than MAX_EXPONENT where it is larger or smaller than that allows. */
static int exponent_of(const number *n) {
    const uint8_t *p = n->exponent;
    if (!p) return 0;

    int negative = *p == '-', value = 0;
    p += *p == '+' || *p == '-';
    for (; p < n->end; p++)
        if ((value = value * 10 + (*p - '0')) > MAX_EXPONENT) return MAX_EXPONENT + 1;

    return negative ? -value : value;
}

/* Nanoseconds of digits whose last `finer` ones are behind the point, rounded: a half to even; -1 beyond 64 bits. */
static int64_t rounded_ns(const uint8_t *digits, int count, int finer) {
    int64_t ns = 0;
    int whole = count - finer, next, rest = 0;
    for (int i = 0; i < whole; i++) {
        if (ns >= INT64_MAX / 10) return -1;
        ns = ns * 10 + (i < count ? digits[i] : 0);
    }

    next = whole >= 0 && whole < count ? digits[whole] : 0;
    for (int i = whole < 0 ? 0 : whole + 1; i < count; i++) rest |= digits[i];
    return ns + (next > 5 || (next == 5 && (rest || ns & 1)));
}

/* A time as nanoseconds. */
static int take_time(cursor *c, event *e, int64_t *ns) {
    number n;
    if (*c->p != '-' && !is_digit(*c->p)) return c->unsure = 1, skip_value(c);

    int outcome = take_number(c, &n);
    if (outcome) return outcome;

    int exponent = exponent_of(&n), count = 0, finer = -c->decimals - exponent;
    if (n.negative || exponent > MAX_EXPONENT || n.end - n.at > MAX_TIME_LENGTH) return c->unsure = 1, OK;

    uint8_t digits[MAX_TIME_LENGTH];
    const uint8_t *end = n.exponent ? n.exponent - 1 : n.end;
    for (const uint8_t *p = n.at; p < end; p++) {
        if (*p == '.') continue;
        digits[count++] = *p - '0';
        finer += n.point && p >= n.point;
    }

    int64_t value = rounded_ns(digits, count, finer);
    if (value < 0) return c->unsure = 1, OK;

    e->fractional |= n.point || n.exponent;
    *ns = value;
    return OK;
}

/* A text or an integer to intern. */
static int take_label(cursor *c, slice *label) {
    int escaped;
    if (*c->p == '"') {
        c->p++;
        return take_string(c, label, &escaped);
    }

    if (!is_digit(*c->p) && *c->p != '-') return c->unsure = 1, skip_value(c);

    number n;
    const uint8_t *start = c->p;
    int outcome = take_number(c, &n);
    if (outcome) return outcome;
    if (n.point || n.exponent || (n.negative && *n.at == '0')) c->unsure = 1;

    *label = (slice){start, (uint32_t)(n.end - start), 'n'};
    if (n.end - start > MAX_DIGITS) c->unsure = 1;
    return OK;
}

static int take_kind(cursor *c, event *e) {
    slice text = {0};
    int escaped = 0;
    if (*c->p == '"') {
        c->p++;
        int outcome = take_string(c, &text, &escaped);
        if (outcome) return outcome;
        if (text.length == 1 && *text.at > 0x20 && *text.at < 0x7F && *text.at != 'M') e->ph = *text.at;
        else c->unsure = 1;
        return OK;
    }

    if (*c->p == '1' && (c->p[1] == ',' || c->p[1] == '}')) return c->p++, e->ph = 'X', OK;

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

/* A key and its colon, up to the value. */
static inline int take_key(cursor *c, slice *key) {
    int escaped, outcome;
    if (*c->p != '"') return ended(c, c->p);
    c->p++;
    if ((outcome = take_string(c, key, &escaped))) return outcome;
    if (escaped) c->unsure = 1;
    c->p = skip_space(c->p);
    if (*c->p != ':') return ended(c, c->p);
    c->p = skip_space(c->p + 1);
    return OK;
}

static int take_args(cursor *c, event *e, const scanner *s) {
    for (uint32_t k = 0; k < s->keys; k++) e->args[k].kind = MISSING; /* a second `args` replaces the first */

    if (!s->keys || *c->p != '{') return skip_value(c);

    c->p = skip_space(c->p + 1);
    if (*c->p == '}') return c->p++, OK;

    for (;;) {
        slice key;
        int outcome = take_key(c, &key);
        if (outcome) return outcome;

        uint32_t k = 0;
        while (k < s->keys && (s->key[k].length != key.length || memcmp(s->key[k].at, key.at, key.length))) k++;
        outcome = k < s->keys ? take_arg(c, &e->args[k]) : skip_value(c);
        if (outcome) return outcome;

        c->p = skip_space(c->p);
        if (*c->p == '}') return c->p++, OK;
        if (*c->p != ',') return ended(c, c->p);
        c->p = skip_space(c->p + 1);
    }
}

#define IS(key, word) (!memcmp((key).at, word, sizeof(word) - 1))

/* Phase codes that use the id: for others an unusual id does not matter. */
static int take_id(cursor *c, event *e) {
    int before = c->unsure, outcome = take_label(c, &e->id);
    if (c->unsure != before) e->unusual_id = 1;
    c->unsure = before;
    return outcome;
}

static inline int take_value(cursor *c, event *e, const scanner *s, slice key) {
    switch (key.length) {
    case 2:
        if (IS(key, "ts")) return take_time(c, e, &e->ts_ns);
        if (IS(key, "ph")) return take_kind(c, e);
        if (IS(key, "id")) return take_id(c, e);
        break;
    case 3:
        if (IS(key, "pid")) return take_label(c, &e->pid);
        if (IS(key, "tid")) return take_label(c, &e->tid);
        if (IS(key, "cat")) return take_label(c, &e->cat);
        if (IS(key, "dur")) return take_time(c, e, &e->dur_ns);
        if (IS(key, "id2")) e->unusual_id = 1;
        break;
    case 4:
        if (IS(key, "name")) return take_label(c, &e->name);
        if (IS(key, "args")) return take_args(c, e, s);
        break;
    }

    return skip_value(c);
}

static int take_event(cursor *c, event *e, const scanner *s) {
    memset(e, 0, offsetof(event, args));
    for (uint32_t k = 0; k < s->keys; k++) e->args[k].kind = MISSING;
    e->ts_ns = NO_TIME, e->dur_ns = -1;
    c->unsure = 0;
    if (*c->p != '{') return BAD;

    c->p = skip_space(c->p + 1);
    if (*c->p == '}') return c->p++, OK;

    for (;;) {
        slice key;
        int outcome = take_key(c, &key);
        if (outcome) return outcome;
        if ((outcome = take_value(c, e, s, key))) return outcome;

        c->p = skip_space(c->p);
        if (*c->p == '}') return c->p++, OK;
        if (*c->p != ',') return ended(c, c->p);
        c->p = skip_space(c->p + 1);
    }
}

static inline int has_identity(uint8_t ph) {
    return ph != 'X' && ph && strchr("bensftNOD", ph) != NULL;
}

static int put_row(scanner *s, columns *out, const event *e, const uint8_t *end) {
    int64_t row = out->rows;
    int32_t name = intern(s, e->name, end), cat = intern(s, e->cat, end);
    int32_t pid = intern(s, e->pid, end), tid = intern(s, e->tid, end);
    int32_t id = has_identity(e->ph) ? intern(s, e->id, end) : -1;
    int short_of_memory = name == -2 || cat == -2 || pid == -2 || tid == -2 || id == -2;
    out->ph[row] = e->ph;
    out->name[row] = name, out->cat[row] = cat, out->pid[row] = pid, out->tid[row] = tid, out->id[row] = id;
    out->ts_ns[row] = e->ts_ns, out->dur_ns[row] = e->dur_ns;
    out->fractional |= e->fractional;
    for (uint32_t k = 0; k < s->keys; k++) {
        const arg *a = &e->args[k];
        int64_t at = (int64_t)k * out->capacity + row;
        out->arg_kinds[at] = a->kind;
        out->arg_integers[at] = a->kind == INTEGER ? a->integer : 0;
        out->arg_floats[at] = a->kind == INTEGER || a->kind == FLOAT ? a->number : __builtin_nan("");
        out->arg_texts[at] = a->kind == TEXT ? intern(s, a->text, end) : -1;
        short_of_memory |= out->arg_texts[at] == -2;
    }

    return !short_of_memory;
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
    free(s->entries), free(s->slots), free(s->arena), free(s->key_text), free(s);
}

/* Create a scanner; `keys` are zero-terminated texts, one after another. */
scanner *traceml_scanner_new(const char *keys, int64_t length, int32_t count) {
    scanner *s = calloc(1, sizeof *s);
    if (!s || count > MAX_KEYS) return free(s), NULL;

    s->capacity = 1024, s->mask = 4095, s->arena_size = 1 << 16;
    s->entries = malloc(sizeof(entry) * s->capacity);
    s->slots = calloc((size_t)s->mask + 1, sizeof(uint32_t));
    s->arena = malloc(s->arena_size);
    s->key_text = malloc((size_t)length + 1);
    if (!s->entries || !s->slots || !s->arena || !s->key_text) return traceml_scanner_free(s), NULL;

    memcpy(s->key_text, keys, (size_t)length);
    const uint8_t *at = s->key_text;
    for (int32_t k = 0; k < count; k++) {
        uint32_t size = (uint32_t)strlen((const char *)at);
        s->key[k] = (slice){at, size, 's'};
        at += size + 1;
    }

    s->keys = (uint32_t)count;
    return s;
}

int32_t traceml_scanner_count(const scanner *s) { return (int32_t)s->count; }

/* Texts from a number on, one after another, each after its tag; `ends` are offsets from the returned address. */
const uint8_t *traceml_scanner_texts(const scanner *s, int32_t first, int64_t *ends) {
    for (uint32_t i = (uint32_t)first; i < s->count; i++)
        ends[i - (uint32_t)first] = (int64_t)(s->entries[i].at - s->entries[first].at) + s->entries[i].length + 1;

    return s->arena + s->entries[first].at;
}

/* Read events from `start` on; append them to the rows of `out`. */
int32_t traceml_scan(scanner *s, const uint8_t *text, int64_t start, int64_t end, int32_t wrapped, int32_t decimals,
                columns *out) {
    cursor c = {text + start, text + end, 0, decimals};
    event e;
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
        else if (!put_row(s, out, &e, c.end))
            return DEEP;

        out->rows++;
    }
}
