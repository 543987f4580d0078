/* Numbers of texts: dense from 0, in the order of appearance. */
#ifndef TRACEML_NAME_TABLE_H
#define TRACEML_NAME_TABLE_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "json_text.h"

typedef struct {
    uint64_t hash;
    uint64_t head;  /* the first bytes of the text */
    uint64_t shape; /* of the text: see shape_of */
    uint64_t at;    /* offset in the arena; the first byte is the tag */
} entry;

typedef struct {
    entry *entries;
    uint32_t *slots; /* number of an entry + 1 */
    uint8_t *arena;
    uint64_t arena_used, arena_size;
    uint32_t count, capacity, mask;
} name_table;

/* Length and tag. */
static inline uint64_t shape_of(slice text) { return (uint64_t)text.length << 8 | text.tag; }

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

static inline uint64_t hash_of(slice text, uint64_t word, const uint8_t *end) {
    uint64_t h = 0x9E3779B97F4A7C15ull ^ shape_of(text);
    for (;;) {
        h = (h ^ word) * 0xD6E8FEB86659FD93ull;
        h ^= h >> 32;
        if (text.length <= 8) return h;

        text.at += 8, text.length -= 8;
        word = word_at(text.at, text.length, end);
    }
}

static int grow(name_table *s) {
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

static inline int is_text(const name_table *s, const entry *known, slice text, uint64_t head) {
    return known->head == head && known->shape == shape_of(text) &&
           (text.length <= 8 || !memcmp(s->arena + known->at + 1, text.at, text.length));
}

/* Add a text that is not known; return its number, or -2 when memory is exhausted. */
static int32_t add_text(name_table *s, slice text, uint64_t head, uint64_t hash) {
    if (s->count == s->capacity && !grow(s)) return -2;

    if (s->arena_used + text.length + 1 > s->arena_size) {
        uint64_t size = (s->arena_size + text.length) * 2;
        uint8_t *arena = realloc(s->arena, size);
        if (!arena) return -2;
        s->arena = arena, s->arena_size = size;
    }

    uint32_t slot = (uint32_t)hash & s->mask;
    while (s->slots[slot]) slot = (slot + 1) & s->mask;
    s->entries[s->count] = (entry){hash, head, shape_of(text), s->arena_used};
    s->arena[s->arena_used] = text.tag;
    memcpy(s->arena + s->arena_used + 1, text.at, text.length);
    s->arena_used += text.length + 1;
    s->slots[slot] = ++s->count;
    return (int32_t)(s->count - 1);
}

/* Number of a text; -1 when it is missing, -2 when memory is exhausted. */
static inline int32_t intern(name_table *s, slice text, const uint8_t *end) {
    if (!text.tag) return -1;

    uint64_t head = word_at(text.at, text.length, end);
    uint64_t hash = hash_of(text, head, end);
    for (uint32_t slot = (uint32_t)hash & s->mask, number; (number = s->slots[slot]); slot = (slot + 1) & s->mask)
        if (is_text(s, &s->entries[number - 1], text, head)) return (int32_t)(number - 1);

    return add_text(s, text, head, hash);
}

#endif
