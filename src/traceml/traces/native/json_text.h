/* JSON text, by its grammar: strings, numbers, and values to skip. */
#ifndef TRACEML_JSON_TEXT_H
#define TRACEML_JSON_TEXT_H

#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#define MAX_DEPTH 60
#define MAX_DIGITS 18 /* digits of a number that always fits in 64 bits */

enum outcome { OK, CUT, BAD, TOO_DEEP, OVER }; /* OVER: the object has no more members */

typedef struct {
    const uint8_t *at;
    uint32_t length;
    uint8_t tag; /* 0 missing, 's' text as written, 'n' integer as written */
} slice;

typedef struct {
    const uint8_t *p, *end; /* less than 4 GiB apart */
    int unsure;
    int decimals; /* decimals of a time in the text that make it nanoseconds */
} cursor;

static inline const uint8_t *skip_space(const uint8_t *p) {
    while (*p <= ' ' && (*p == ' ' || *p == '\n' || *p == '\r' || *p == '\t')) p++;
    return p;
}

static inline int ended(const cursor *c, const uint8_t *p) { return p >= c->end ? CUT : BAD; }

static inline int is_hex(uint8_t c) {
    return (c >= '0' && c <= '9') || ((c | 32) >= 'a' && (c | 32) <= 'f');
}

#define ONES 0x0101010101010101ull
#define HIGH 0x8080808080808080ull
#define HAS_ZERO(v) (((v) - ONES) & ~(v) & HIGH)

/* The first quote, backslash or byte below 0x20 at or after a position; may stop before it, close to the end. */
static inline const uint8_t *special(const uint8_t *p, const uint8_t *end) {
#ifdef __SSE2__
    const __m128i quote = _mm_set1_epi8('"'), slash = _mm_set1_epi8('\\'), control = _mm_set1_epi8(0x1F);
    for (; end - p >= 16; p += 16) {
        __m128i v = _mm_loadu_si128((const __m128i *)p);
        __m128i ends = _mm_or_si128(_mm_cmpeq_epi8(v, quote), _mm_cmpeq_epi8(v, slash));
        __m128i low = _mm_cmpeq_epi8(_mm_min_epu8(v, control), v);
        int hit = _mm_movemask_epi8(_mm_or_si128(ends, low));
        if (hit) return p + __builtin_ctz((unsigned)hit);
    }
#endif
    for (; end - p >= 8; p += 8) {
        uint64_t v;
        memcpy(&v, p, 8);
        /* exact up to the first hit, and only that is used */
        uint64_t hit = HAS_ZERO(v ^ (ONES * '"')) | HAS_ZERO(v ^ (ONES * '\\')) | ((v - ONES * 0x20) & ~v & HIGH);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
        if (hit) return p + (__builtin_ctzll(hit) >> 3);
#else
        if (hit) return p;
#endif
    }

    return p;
}

/* Pass what `special` stopped at, up to the closing quote of a text. */
static int pass_special(cursor *c, const uint8_t **at, int *escaped) {
    const uint8_t *p = *at;
    for (;; p = special(p, c->end)) {
        while (*p >= 0x20 && *p != '"' && *p != '\\') p++;
        if (*p == '"') return *at = p, OK;
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
}

/* Text after its opening quote; moves the cursor past the closing one. */
static inline int take_string(cursor *c, slice *text, int *escaped) {
    const uint8_t *start = c->p, *p = special(start, c->end);
    *escaped = 0;
    if (*p != '"') {
        int outcome = pass_special(c, &p, escaped);
        if (outcome) return outcome;
    }

    *text = (slice){start, (uint32_t)(p - start), 's'};
    c->p = p + 1;
    return OK;
}

static inline int is_digit(uint8_t c) { return (uint8_t)(c - '0') < 10; }

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
/* Number of digits at the begin of eight bytes. */
static inline int digits_in(uint64_t eight) {
    const uint64_t high = 0xF0F0F0F0F0F0F0F0ull, digit = 0x3030303030303030ull;
    /* a carry into the next byte comes from a byte that is no digit, and only the first of these counts */
    uint64_t other = ((eight & high) ^ digit) | (((eight + 0x0606060606060606ull) & high) ^ digit);
    return other ? __builtin_ctzll(other) >> 3 : 8;
}
#endif

/* Behind an integer of up to seven digits that surely ends there; NULL for any other text. */
static inline const uint8_t *skip_small(const uint8_t *p, const uint8_t *end) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    uint64_t eight;
    if (end - p < 8) return NULL;

    memcpy(&eight, p, 8);
    int count = digits_in(eight);
    if (count - 1u < 7 && (*p != '0' || count == 1) && (p[count] == ',' || p[count] == '}')) return p + count;
#endif
    return NULL;
}

static inline const uint8_t *skip_digits(const uint8_t *p, const uint8_t *end) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    for (int count = 8; count == 8 && end - p >= 8; p += count) {
        uint64_t eight;
        memcpy(&eight, p, 8);
        count = digits_in(eight);
    }
#endif
    while (is_digit(*p)) p++;
    return p;
}

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
    if (p == n->at) p = skip_digits(p, c->end);
    n->end = p;
    if (*p == '.') {
        n->point = ++p;
        if (!is_digit(*p)) return ended(c, p);
        p = skip_digits(p, c->end);
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

#endif
