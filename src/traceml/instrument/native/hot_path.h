/* The hot path of the step clock: fields of the open step, and hooks around the calls of a training loop.
 *
 * Limited API of Python 3.11: one library serves 3.11 and all later versions. Vectorcall is part of it from 3.12 on,
 * but 3.11 exports the same symbols, so they are declared here. */
#ifndef TRACEML_HOT_PATH_H
#define TRACEML_HOT_PATH_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>
#include <string.h>
#include <time.h>

#define VECTORCALL_FLAG (1UL << 11)
#define METHOD_DESCRIPTOR_FLAG (1UL << 17)
#define ARGUMENTS_OFFSET ((size_t)1 << (8 * sizeof(size_t) - 1))

PyAPI_FUNC(PyObject *) PyObject_Vectorcall(PyObject *, PyObject *const *, size_t, PyObject *);
PyAPI_FUNC(PyObject *) PyVectorcall_Call(PyObject *, PyObject *, PyObject *);
PyAPI_FUNC(PyObject *) PyWeakref_GetObject(PyObject *); /* later headers may leave it out, the stable ABI cannot */

#include "schema.h" /* hatch_build.py writes it from database/schema.py; Python compares its `LAYOUT` with the schema */

#ifndef __has_builtin
#define __has_builtin(name) 0
#endif

/* Code that a usual step does not run lies apart from the code that it runs: a hook finds its lines out of the cache. */
#define COLD __attribute__((cold, noinline))
#define LIKELY(truth) __builtin_expect(!!(truth), 1)

/* Memory of the flight file: its words, the rows of a ring, and the words with the ring's counter. */
typedef struct {
    Py_buffer words, rows, counts;
} RingMemory;

/* A user phase that has begun: the phase around it, and when it began, or since when its time is not booked. */
typedef struct {
    PyObject *phase;
    long long previous, start;
} OpenUserPhase;

/* What hooks use in each step comes first and lies together, as the caches are cold for it. */
typedef struct {
    PyObject_HEAD
    unsigned long thread;
    long long current;
    long long *words; /* those of the flight file; NULL while others stand in for them */
    PyObject *closing_trigger, *input_shape, *on_forward, *check_forward, *first_loader;
    char needs_slow_commit, has_user_phases, needs_slow_backward, inspects;
    int open_users;
    long long backwards, batches, rows, part_start;
    long long input_ns, forward_ns, backward_ns, optimizer_ns;
    long long input_samples, input_elements, samples, elements;
    long long step_call, last_optimizer, loss_mask, before, slow_row;
    long long failure, failed_in; /* id of the exception that left a hook last, and the phase */
    /* From `connect`: the memory of the flight file, and objects of the clock's rules. */
    long long *count, *first_row;
    long long mask, micro_mask, no_loader_bits, maintenance_mask, sequence_unit, sequence_mask;
    PyObject *not_ready, *usual_trigger, *usual_loader, *batch;
    PyObject *open_slots, *mapped_slots, *rare_times, *in_context, *sequence;
    OpenUserPhase *open_user_phases; /* innermost last */
    Py_ssize_t user_room;
    RingMemory memory;
} HotFields;

#pragma GCC visibility push(hidden) /* known to be in this library: found without the table of other libraries' names */
extern PyTypeObject *hot_fields_type;
extern PyObject *time_source; /* for tests: replaces the clock */

PyTypeObject *make_hot_fields_type(void);
PyTypeObject *make_hook_type(void);
PyTypeObject *make_user_phase_type(void);
PyObject *use_time(PyObject *module, PyObject *source);
PyObject *metric_writer(PyObject *module, PyObject *args);
PyObject *passing_on(PyObject *module, PyObject *own);
PyObject *of_types(PyObject *module, PyObject *args);

PyObject *method_enter(PyObject *self, PyObject *number);
PyObject *method_leave(PyObject *self, PyObject *const *args, Py_ssize_t n);
PyObject *method_cancel(PyObject *self, PyObject *const *args, Py_ssize_t n);
PyObject *method_account_user_phases(PyObject *self, PyObject *time);
PyObject *method_end_user_phases(PyObject *self, PyObject *time);

/* Map memory with at least this many words, and rows up to number `mask`. Returns 0, or -1 with an exception set. */
COLD int map_ring(RingMemory *memory, PyObject *slots, int words, PyObject *buffer, long long offset, long long mask,
                  int columns, PyObject *count, long long slot);
COLD void unmap_ring(RingMemory *memory);

/* Begin a phase; return 1, 0 if it does not count, or -1 with an exception set. */
int enter_phase(HotFields *hot, long long phase, long long *previous, long long *start);

/* All return 0, or -1 with an exception set. */
int leave_phase(HotFields *hot, long long phase, long long previous, long long start);
int commit_step(HotFields *hot, long long t);
COLD int read_source(long long *now);
COLD int set_item(HotFields *hot, int index, long long value);
COLD int call_method(HotFields *hot, const char *name, long long number, PyObject *object);

/* After an exception in our code: pass it to the clock's `fail`, which switches the hooks off. Returns 0; -1 where it
 * is none of ours, such as KeyboardInterrupt, and stays set. */
COLD int fail_open(HotFields *hot);

/* Whether this thread, which is not the clock's, runs in its context. */
COLD int is_in_context(HotFields *hot);
#pragma GCC visibility pop

/* The number of this thread. The module checks at its import that Python tells the same. */
static inline unsigned long this_thread(void) {
#if defined(__x86_64__) && defined(__GLIBC__) && __has_builtin(__builtin_thread_pointer)
    return (unsigned long)__builtin_thread_pointer();
#else
    return PyThread_get_thread_ident();
#endif
}

static inline int is_training_thread(HotFields *hot) {
    return LIKELY(hot->thread == this_thread()) ? 1 : is_in_context(hot);
}

/* Whether neither a test nor a device sees the clock readings and words. */
static inline int is_plain(const HotFields *hot) { return !time_source && hot->words; }

static inline int read_clock(long long *now) {
    if (!LIKELY(!time_source)) return read_source(now);

    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    *now = time.tv_sec * 1000000000LL + time.tv_nsec;
    return 0;
}

static inline int set_word(HotFields *hot, int index, long long value) {
    if (!LIKELY(hot->words)) return set_item(hot, index, value);

    hot->words[index] = value;
    return 0;
}

static inline PyObject *none_for_null(PyObject *object) { return object ? object : Py_None; }

/* Not Py_RETURN_NONE: with the headers of 3.12 and later it takes None for immortal, which it is not in 3.11. */
static inline PyObject *new_none(void) {
    Py_INCREF(Py_None);
    return Py_None;
}

static inline void assign(PyObject **field, PyObject *value) {
    PyObject *old = *field;
    Py_XINCREF(value);
    *field = value;
    Py_XDECREF(old);
}

#endif
