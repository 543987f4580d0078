/* Times: decimal numbers as nanoseconds, finer ones rounded. */
#ifndef TRACEML_TIMES_H
#define TRACEML_TIMES_H

#include <stdint.h>

#include "json_text.h"

#define MAX_TIME_LENGTH 60 /* as written; a longer one is for the scanner in Python */
#define MAX_EXPONENT 99

static const int64_t tens[] = {1ll, 10ll, 100ll, 1000ll, 10000ll, 100000ll, 1000000ll, 10000000ll, 100000000ll,
                               1000000000ll, 10000000000ll, 100000000000ll, 1000000000000ll, 10000000000000ll,
                               100000000000000ll, 1000000000000000ll, 10000000000000000ll, 100000000000000000ll,
                               1000000000000000000ll};

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

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
/* Value of the first digits, one to eight, of eight bytes. */
static inline uint64_t value_of(uint64_t eight, int count) {
    uint64_t v = (eight << (64 - 8 * count)) & 0x0F0F0F0F0F0F0F0Full; /* with zeros before the digits */
    v = v * 2561 >> 8;                                                /* two digits each, then four, then eight */
    v = (v & 0x00FF00FF00FF00FFull) * 6553601 >> 16;
    return (v & 0x0000FFFF0000FFFFull) * 42949672960001ull >> 32;
}
#endif

/* Append digits to a value, which is right for up to MAX_DIGITS in all; return the end of the digits. */
static inline const uint8_t *take_digits(const uint8_t *p, const uint8_t *end, uint64_t *value) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    for (int count = 8; count == 8 && end - p >= 8; p += count) {
        uint64_t v;
        memcpy(&v, p, 8);
        if (!(count = digits_in(v))) return p;

        *value = *value * (uint64_t)tens[count] + value_of(v, count);
    }
#endif
    for (; is_digit(*p); p++) *value = *value * 10 + (uint64_t)(*p - '0');
    return p;
}

/* A whole time of up to 16 digits that surely ends there; returns 0 for any other text, which is not consumed. */
static inline int take_whole_time(cursor *c, int64_t *ns) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    uint64_t eight, value;
    const uint8_t *p = c->p;
    if (c->end - p <= 16) return 0;

    memcpy(&eight, p, 8);
    int count = digits_in(eight), more = 0;
    if (!count || (*p == '0' && count > 1)) return 0;

    value = value_of(eight, count);
    if (count == 8) {
        memcpy(&eight, p + 8, 8);
        more = digits_in(eight);
        if (more) value = value * (uint64_t)tens[more] + value_of(eight, more);
    }

    p += count + more;
    if ((*p != ',' && *p != '}') || __builtin_mul_overflow((int64_t)value, tens[c->decimals], ns)) return 0;

    c->p = p;
    return 1;
#else
    return 0;
#endif
}

/* A usual time: up to MAX_DIGITS digits before and behind the point, without sign and exponent.
 *
 * Returns 0 for any other text, which is not consumed.
 */
static inline int take_usual_time(cursor *c, int64_t *ns, int *fractional) {
    uint64_t whole = 0, part = 0;
    const uint8_t *point = take_digits(c->p, c->end, &whole), *p = point;
    if (point == c->p || point - c->p > MAX_DIGITS || (*c->p == '0' && point > c->p + 1)) return 0;
    if (*point == '.') p = take_digits(point + 1, c->end, &part);
    if (p == point + 1 || p >= c->end || (*p | 32) == 'e') return 0;

    int64_t value, up = 0;
    int decimals = p == point ? 0 : (int)(p - point) - 1, finer = decimals - c->decimals;
    if (decimals > MAX_DIGITS || __builtin_mul_overflow((int64_t)whole, tens[c->decimals], &value)) return 0;
    if (finer > 0) { /* rounded, a half to even */
        uint64_t unit = (uint64_t)tens[finer], rest = part % unit;
        part /= unit;
        up = 2 * rest > unit || (2 * rest == unit && (((uint64_t)value + part) & 1));
    } else {
        part *= (uint64_t)tens[-finer];
    }

    if (__builtin_add_overflow(value, (int64_t)part + up, &value)) return 0;

    *fractional |= decimals > 0;
    *ns = value;
    c->p = p;
    return 1;
}

/* A time as nanoseconds; `fractional` is set when it has a point or an exponent. */
static int take_time(cursor *c, int64_t *ns, int *fractional) {
    number n;
    if (take_whole_time(c, ns) || take_usual_time(c, ns, fractional)) return OK;
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

    *fractional |= n.point || n.exponent;
    *ns = value;
    return OK;
}

#endif
