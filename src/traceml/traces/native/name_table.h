/* Numbers of texts: dense from 0, in the order of appearance. */
#ifndef TRACEML_NAME_TABLE_H
#define TRACEML_NAME_TABLE_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "json_text.h"

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
} name_table;

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
    return known->head == head && known->length == text.length && known->tag == text.tag &&
           (text.length <= 8 || !memcmp(s->arena + known->at + 1, text.at, text.length));
}

/* Number of a text; -1 when it is missing, -2 when memory is exhausted. */
static int32_t intern(name_table *s, slice text, const uint8_t *end) {
    if (!text.tag) return -1;

    uint64_t head = word_at(text.at, text.length, end);
    uint64_t hash = hash_of(text.at, text.length, text.tag, head, end);
    uint32_t slot = (uint32_t)hash & s->mask;
    for (; s->slots[slot]; slot = (slot + 1) & s->mask) {
        const entry *known = &s->entries[s->slots[slot] - 1];
        if (known->hash == hash && is_text(s, known, text, head)) return (int32_t)(s->slots[slot] - 1);
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

#endif
