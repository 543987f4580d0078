/* Kernels of the analysis: statistics per group, numbering of pairs, self time, pairs of begin and end, overlap;
 * and the search of compressed files.
 *
 * Plain C without Python.h: called through ctypes, so other threads run at the same time. Every kernel works on arrays
 * owned by its caller. A kernel that runs out of room stops at the first element that does not fit and returns its
 * index; the caller makes room and continues from there. The modules of aggregate/ compute the same in numpy and
 * Python, for hosts without a compiler.
 */
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#define VERSION 8  /* raised when arguments or constants of this library change; library.py expects it */
#define CELLS 128  /* buckets per power of two: at most 1/128 wide, so their middles are within 0.4 % */
#define OCTAVES 57 /* 0..127 exactly, then one per power of two up to 2^63 */
#define FEW 4      /* values stored per group before a histogram is used: with many groups, most have no more */
#define CLASSES 7
#define BINS 1024

int64_t traceml_version(void) { return VERSION; }

/* Position of a short sequence of bytes (two or more) from `first` on; -1 without it. */
int64_t traceml_find(const uint8_t *data, int64_t first, int64_t size, const uint8_t *sought, int64_t length) {
  int64_t i = first, last = size - length;
#ifdef __SSE2__
  const __m128i one = _mm_set1_epi8((char)sought[0]), two = _mm_set1_epi8((char)sought[1]);
  for (; i + 16 <= last; i += 16) {
    __m128i begin = _mm_cmpeq_epi8(_mm_loadu_si128((const __m128i *)(data + i)), one);
    __m128i next = _mm_cmpeq_epi8(_mm_loadu_si128((const __m128i *)(data + i + 1)), two);
    for (int hit = _mm_movemask_epi8(_mm_and_si128(begin, next)); hit; hit &= hit - 1) {
      int64_t at = i + __builtin_ctz((unsigned)hit);
      if (!memcmp(data + at, sought, (size_t)length)) return at;
    }
  }
#endif
  for (; i <= last; i++)
    if (!memcmp(data + i, sought, (size_t)length)) return i;
  return -1;
}

static inline void add_wide(uint64_t *low, int64_t *high, int64_t value) {
  uint64_t before = *low;
  *low += (uint64_t)value;
  *high += (value < 0 ? -1 : 0) + (*low < before);
}

/* Count a value in the histogram of a group; `pages` contains its page for each octave + 1, 0 for none yet. */
static inline void tally(int64_t v, int32_t *pages, int64_t *cells, int64_t *used) {
  int octave = 0, cell = (int)v;
  if (v >= CELLS) {
    int e = 63 - __builtin_clzll((uint64_t)v);
    octave = e - 6;
    cell = (int)((v >> (e - 7)) & (CELLS - 1));
  }
  if (!pages[octave]) pages[octave] = (int32_t)++*used;
  cells[(int64_t)(pages[octave] - 1) * CELLS + cell]++;
}

/* Count, sum (128 bits), minimum, maximum and histogram of durations, by group. */
int64_t traceml_stats(int64_t first, int64_t n, const int32_t *group, const int64_t *value, int64_t *count,
                      uint64_t *low, int64_t *high, int64_t *least, int64_t *most, int64_t *few, int32_t *pages,
                      int64_t *cells, int64_t *used, int64_t room) {
  for (int64_t i = first; i < n; i++) {
    int64_t v = value[i];
    int32_t g = group[i];
    if (count[g] < FEW) {
      few[(int64_t)g * FEW + count[g]] = v;
    } else {
      int32_t *own = &pages[(int64_t)g * OCTAVES];
      if (*used + FEW + 1 > room) return i; /* maximum number of new pages for one value */
      for (int k = 0; count[g] == FEW && k < FEW; k++) tally(few[(int64_t)g * FEW + k], own, cells, used);
      tally(v, own, cells, used);
    }
    count[g]++;
    add_wide(&low[g], &high[g], v);
    if (v < least[g]) least[g] = v;
    if (v > most[g]) most[g] = v;
  }
  return n;
}

static inline uint64_t mix(uint64_t x) {
  x ^= x >> 31;
  x *= 0x9E3779B97F4A7C15ull;
  x ^= x >> 29;
  return x;
}

/* Number distinct pairs, dense from 0 in the order of appearance. The number of slots of `table` is a power of two. */
int64_t traceml_pairs(int64_t first, int64_t n, const int32_t *left, const int32_t *right, int32_t *out,
                      int32_t *table, int64_t mask, int64_t *keys, int64_t *used) {
  int64_t last_key = 0;
  int32_t last = -1;
  for (int64_t i = first; i < n; i++) {
    int64_t key = (int64_t)(((uint64_t)(uint32_t)left[i] << 32) | (uint32_t)right[i]);
    if (last >= 0 && key == last_key) {
      out[i] = last;
      continue;
    }
    int64_t slot = (int64_t)(mix((uint64_t)key) & (uint64_t)mask);
    while (table[slot] >= 0 && keys[table[slot]] != key) slot = (slot + 1) & mask;
    if (table[slot] < 0) {
      if (2 * (*used + 1) > mask) return i;
      keys[*used] = key;
      table[slot] = (int32_t)(*used)++;
    }
    out[i] = last = table[slot];
    last_key = key;
  }
  return n;
}

/* Time by the innermost open span of each lane; spans are passed in the order of their starts.
 *
 * Only lanes whose number ends in the bits `part` are read; `mask` has all such bits. Others are left to other threads.
 *
 * The stack of a lane is a list in one pool of nodes (start, end, group, link to the node below). `free_head` is the
 * head of the list of unused nodes.
 */
int64_t traceml_nest(int64_t first, int64_t n, int32_t part, int32_t mask, const int64_t *start, const int64_t *dur,
                     const int32_t *group, const int32_t *lane, int32_t *head, int64_t *cursor, int64_t *node_start,
                     int64_t *node_end, int32_t *node_group, int32_t *node_below, int32_t *free_head, uint64_t *low,
                     int64_t *high) {
  for (int64_t i = first; i < n; i++) {
    if ((lane[i] & mask) != part || dur[i] <= 0) continue;
    if (*free_head < 0) return i;
    int64_t s = start[i], end = s + dur[i];
    int32_t l = lane[i], top = head[l];
    int64_t at = cursor[l];
    while (top >= 0 && node_end[top] <= s) {
      if (node_end[top] > at) {
        add_wide(&low[node_group[top]], &high[node_group[top]], node_end[top] - at);
        at = node_end[top];
      }
      int32_t below = node_below[top];
      node_below[top] = *free_head;
      *free_head = top;
      top = below;
    }
    if (top >= 0 && s > at) add_wide(&low[node_group[top]], &high[node_group[top]], s - at);
    cursor[l] = s;
    /* Of spans with the same start the longer one is outside; of equal ones the one that was written later. */
    int32_t above = -1, under = top;
    while (under >= 0 && node_start[under] == s && node_end[under] <= end) {
      above = under;
      under = node_below[under];
    }
    if (above >= 0 && node_end[above] == end) { /* an equal span is open, so this one is never innermost */
      head[l] = top;
      continue;
    }
    int32_t node = *free_head;
    *free_head = node_below[node];
    node_start[node] = s;
    node_end[node] = end;
    node_group[node] = group[i];
    /* Spans that end before this one are never innermost again: a stack is no deeper than the nesting of its spans. */
    while (under >= 0 && node_end[under] <= end) {
      int32_t below = node_below[under];
      node_below[under] = *free_head;
      *free_head = under;
      under = below;
    }
    node_below[node] = under;
    if (above >= 0) {
      node_below[above] = node;
      head[l] = top;
    } else {
      head[l] = node;
    }
  }
  return n;
}

/* Pair begins with ends of the same lane, in the order of time; open begins stay in the stacks.
 *
 * An end with a name closes the innermost begin of that name; begins above it stay open for ends that come later. Spans
 * go to the `out_` arrays, which have room for one per input row. `tally` counts spans, ends of a begin with others above
 * it, and ends without a begin.
 *
 * An open begin is in two lists: of its lane, linked both ways from `head`, and of its key (a lane and a name), linked
 * from `top`. So the time of a row does not depend on the number of open begins. The innermost begin of a lane is the
 * innermost of its key too: whichever begin is closed, it is the first in the list of its key.
 */
int64_t traceml_match(int64_t first, int64_t n, const int64_t *ts, const uint8_t *is_end, const int32_t *lane,
                      const int32_t *name, const int32_t *group, const uint8_t *mark, const int32_t *key,
                      int32_t *head, int32_t *top, int64_t *node_ts, int32_t *node_key, int32_t *node_group,
                      uint8_t *node_mark, int32_t *node_below, int32_t *node_above, int32_t *node_under,
                      int32_t *free_head, int64_t *out_start, int64_t *out_dur, int32_t *out_group, int32_t *out_lane,
                      uint8_t *out_mark, int64_t *tally) {
  for (int64_t i = first; i < n; i++) {
    int32_t l = lane[i], k = key[i], node;
    if (!is_end[i]) {
      if (*free_head < 0) return i;
      node = *free_head;
      *free_head = node_below[node];
      node_ts[node] = ts[i];
      node_key[node] = k;
      node_group[node] = group[i];
      node_mark[node] = mark[i];
      node_below[node] = head[l];
      node_above[node] = -1;
      if (head[l] >= 0) node_above[head[l]] = node;
      head[l] = node;
      node_under[node] = top[k];
      top[k] = node;
      continue;
    }
    node = name[i] >= 0 ? top[k] : head[l];
    if (node < 0) {
      tally[2]++;
      continue;
    }
    int32_t above = node_above[node], below = node_below[node];
    if (above >= 0) {
      node_below[above] = below;
      tally[1]++;
    } else {
      head[l] = below;
    }
    if (below >= 0) node_above[below] = above;
    top[node_key[node]] = node_under[node];
    node_below[node] = *free_head;
    *free_head = node;
    int64_t at = tally[0]++;
    out_start[at] = node_ts[node];
    out_dur[at] = ts[i] - node_ts[node];
    out_group[at] = node_group[node];
    out_lane[at] = l;
    out_mark[at] = node_mark[node];
  }
  return n;
}

/* A timeline of bins of 2^shift ns, the first with number `base`; the bins widen when a time exceeds them. */
typedef struct {
  int64_t shift, base, started;
  int64_t busy[CLASSES + 1][BINS]; /* the last row counts spans by start */
} Timeline;

static void widen(Timeline *timeline) {
  int64_t offset = timeline->base & 1;
  for (int c = 0; c <= CLASSES; c++) {
    int64_t folded[BINS] = {0};
    for (int i = 0; i < BINS; i++) folded[(i + offset) >> 1] += timeline->busy[c][i];
    memcpy(timeline->busy[c], folded, sizeof folded);
  }
  timeline->base >>= 1;
  timeline->shift++;
}

static inline void extend(Timeline *timeline, int64_t when) {
  while ((when >> timeline->shift) - timeline->base >= BINS) widen(timeline);
}

static void add_busy(Timeline *timeline, int mask, int64_t from, int64_t to) {
  extend(timeline, to - 1);
  while (from < to) {
    int64_t bin = from >> timeline->shift, until = (bin + 1) * ((int64_t)1 << timeline->shift);
    if (until > to) until = to;
    for (int c = 0; c < CLASSES; c++)
      if (mask >> c & 1) timeline->busy[c][bin - timeline->base] += until - from;
    from = until;
  }
}

static void advance(int64_t *cursor, const int64_t *ends, int64_t to, int64_t *masks, Timeline *timeline) {
  while (*cursor < to) {
    int mask = 0;
    int64_t next = to;
    for (int c = 0; c < CLASSES; c++)
      if (ends[c] > *cursor) {
        mask |= 1 << c;
        if (ends[c] < next) next = ends[c];
      }
    masks[mask] += next - *cursor;
    if (timeline && mask) add_busy(timeline, mask, *cursor, next);
    *cursor = next;
  }
}

/* Time by set of simultaneously open classes of spans, by unit (a process, a file, all); in the order of starts.
 *
 * `seen`: whether a unit has begun; `ends`: last end of each class; `masks`: time (ns) of each set of open classes.
 * `timeline` may be NULL.
 */
void traceml_overlap(int64_t n, const int64_t *start, const int64_t *dur, const int32_t *unit, const uint8_t *work_class,
                   uint8_t *seen, int64_t *cursor, int64_t *ends, int64_t *masks, Timeline *timeline) {
  for (int64_t i = 0; i < n; i++) {
    int32_t u = unit[i];
    int64_t s = start[i], end = s + dur[i], *open = &ends[(int64_t)u * CLASSES];
    if (!seen[u]) {
      seen[u] = 1;
      cursor[u] = s;
      for (int c = 0; c < CLASSES; c++) open[c] = s;
    }
    advance(&cursor[u], open, s, &masks[(int64_t)u << CLASSES], timeline);
    if (end > open[work_class[i]]) open[work_class[i]] = end;
    if (timeline) {
      if (!timeline->started) {
        timeline->base = s >> timeline->shift;
        timeline->started = 1;
      }
      extend(timeline, s);
      timeline->busy[CLASSES][(s >> timeline->shift) - timeline->base]++;
    }
  }
}
