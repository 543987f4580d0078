/* Begin and end of the phases that hooks in Python and users mark. */
#include "hot_path.h"

#include <stddef.h>

static int add_rare(HotFields *hot, long long bucket, long long ns) {
    PyObject *times = none_for_null(hot->rare_times), *before = PyList_GetItem(times, (Py_ssize_t)bucket);
    long long sum = before ? PyLong_AsLongLong(before) : -1;
    if (sum == -1 && PyErr_Occurred()) return -1;

    if (bucket > PHASE_OTHER) hot->has_user_phases = 1;
    else hot->needs_slow_commit = 1;

    PyObject *after = PyLong_FromLongLong(sum + ns);
    return after ? PyList_SetItem(times, (Py_ssize_t)bucket, after) : -1;
}

static int add_time(HotFields *hot, long long bucket, long long ns) {
    switch (bucket) {
    case PHASE_INPUT_WAIT: hot->input_ns += ns; return 0;
    case PHASE_FORWARD: hot->forward_ns += ns; return 0;
    case PHASE_BACKWARD: hot->backward_ns += ns; return 0;
    case PHASE_OPTIMIZER: hot->optimizer_ns += ns; return 0;
    case PHASE_OTHER: return 0;
    default: return add_rare(hot, bucket, ns);
    }
}

/* Return None after an error of ours, NULL where the exception is none of ours. */
static PyObject *none_after_error(HotFields *hot) {
    if (fail_open(hot)) return NULL;

    return new_none();
}

static PyObject *new_pair(long long first, long long second) {
    PyObject *a = PyLong_FromLongLong(first), *b = PyLong_FromLongLong(second), *pair = NULL;
    if (a && b) pair = PyTuple_Pack(2, a, b);
    Py_XDECREF(a);
    Py_XDECREF(b);
    return pair;
}

int enter_phase(HotFields *hot, long long phase, long long *previous, long long *start) {
    *previous = hot->current;
    if (*previous == PHASE_INPUT_WAIT || *previous == phase || hot->thread != this_thread()) return 0;
    if (read_clock(start)) return -1;

    hot->current = phase;
    return set_word(hot, (int)phase, *start) ? -1 : 1;
}

int leave_phase(HotFields *hot, long long phase, long long previous, long long start) {
    long long now;
    if (read_clock(&now) || add_time(hot, phase, now - start) || add_time(hot, previous, start - now)) return -1;

    hot->current = previous;
    return set_word(hot, (int)phase, 0);
}

PyObject *method_enter(PyObject *self, PyObject *number) {
    HotFields *hot = (HotFields *)self;
    long long phase = PyLong_AsLongLong(number), previous, start;
    if (phase == -1 && PyErr_Occurred()) return none_after_error(hot);

    int status = enter_phase(hot, phase, &previous, &start);
    if (!status) return new_none();

    PyObject *began = status > 0 ? new_pair(previous, start) : NULL;
    return began ? began : none_after_error(hot);
}

/* Read the arguments of `leave` and `cancel`: a phase, and what `enter` returned. */
static int read_began(PyObject *const *args, Py_ssize_t n, long long *phase, long long *previous, long long *start) {
    if (n != 2 || !PyTuple_Check(args[1]) || PyTuple_Size(args[1]) != 2) {
        PyErr_SetString(PyExc_TypeError, "a phase and what `enter` returned are needed");
        return -1;
    }

    *phase = PyLong_AsLongLong(args[0]);
    *previous = PyLong_AsLongLong(PyTuple_GetItem(args[1], 0));
    *start = PyLong_AsLongLong(PyTuple_GetItem(args[1], 1));
    return PyErr_Occurred() ? -1 : 0;
}

PyObject *method_leave(PyObject *self, PyObject *const *args, Py_ssize_t n) {
    long long phase, previous, start;
    if (read_began(args, n, &phase, &previous, &start) || leave_phase((HotFields *)self, phase, previous, start))
        return none_after_error((HotFields *)self);

    return new_none();
}

PyObject *method_cancel(PyObject *self, PyObject *const *args, Py_ssize_t n) {
    HotFields *hot = (HotFields *)self;
    long long phase, previous, start;
    if (read_began(args, n, &phase, &previous, &start)) return none_after_error(hot);

    hot->current = previous;
    if (set_word(hot, (int)phase, 0)) return none_after_error(hot);

    return new_none();
}

/* ---- user phases ---- */

typedef struct {
    PyObject_HEAD
    HotFields *hot;
    long long bucket, name_id;
} UserPhase;

COLD static int make_room(HotFields *hot) {
    Py_ssize_t room = hot->user_room ? 2 * hot->user_room : 8;
    OpenUserPhase *moved = PyMem_Realloc(hot->open_user_phases, (size_t)room * sizeof *moved);
    if (!moved) {
        PyErr_NoMemory();
        return -1;
    }

    hot->open_user_phases = moved;
    hot->user_room = room;
    return 0;
}

/* A list of the open phases would be freed and made anew with each use of a phase. */
static int push_user(HotFields *hot, PyObject *phase, long long previous, long long start) {
    if (!LIKELY(hot->open_users < hot->user_room) && make_room(hot)) return -1;

    OpenUserPhase *open = hot->open_user_phases + hot->open_users++;
    Py_INCREF(phase);
    open->phase = phase;
    open->previous = previous;
    open->start = start;
    return 0;
}

static int begin_user(HotFields *hot, UserPhase *phase) {
    long long t, previous = hot->current;
    if (previous == PHASE_INPUT_WAIT || hot->thread != this_thread()) return 0;
    if (read_clock(&t) || push_user(hot, (PyObject *)phase, previous, t)) return -1;

    hot->current = phase->bucket;
    int failed = add_rare(hot, phase->bucket + 1, 1) || set_word(hot, SLOT_USER_NAME, phase->name_id);
    return failed || set_word(hot, PHASE_USER, t) ? -1 : 0;
}

static int add_user(HotFields *hot, const OpenUserPhase *open, long long t) {
    return add_time(hot, ((UserPhase *)open->phase)->bucket, t - open->start)
                   || add_time(hot, open->previous, open->start - t)
               ? -1
               : 0;
}

/* End the innermost open user phase at `t`. Returns 1 if it is `phase`, else 0; -1 with an exception. */
static int pop_user(HotFields *hot, UserPhase *phase, long long t) {
    OpenUserPhase ended = hot->open_user_phases[--hot->open_users];
    int is_own = ended.phase == (PyObject *)phase, failed = add_user(hot, &ended, t);
    hot->current = ended.previous;
    Py_DECREF(ended.phase);
    return failed ? -1 : is_own;
}

static int is_open_user(HotFields *hot, PyObject *phase) {
    for (Py_ssize_t i = hot->open_users - 1; i >= 0; i--)
        if (hot->open_user_phases[i].phase == phase) return 1;

    return 0;
}

/* Phases of generators and coroutines may end in any order: those inside this one end with it. In a wait none has begun. */
static int end_user(HotFields *hot, UserPhase *phase) {
    long long t;
    if (hot->current == PHASE_INPUT_WAIT || hot->thread != this_thread() || !is_open_user(hot, (PyObject *)phase))
        return 0;
    if (read_clock(&t)) return -1;

    int is_ended = 0;
    while (!is_ended) is_ended = pop_user(hot, phase, t);
    if (is_ended < 0) return -1;

    OpenUserPhase *around = hot->open_users ? hot->open_user_phases + hot->open_users - 1 : NULL;
    long long name_id = around ? ((UserPhase *)around->phase)->name_id : 0, start = around ? around->start : 0;
    return set_word(hot, SLOT_USER_NAME, name_id) || set_word(hot, PHASE_USER, start) ? -1 : 0;
}

/* End all open user phases, whose thread no longer trains. */
PyObject *method_end_user_phases(PyObject *self, PyObject *time) {
    HotFields *hot = (HotFields *)self;
    long long t = PyLong_AsLongLong(time);
    if (t == -1 && PyErr_Occurred()) return NULL;

    while (hot->open_users)
        if (pop_user(hot, NULL, t) < 0) return NULL;

    return set_word(hot, SLOT_USER_NAME, 0) || set_word(hot, PHASE_USER, 0) ? NULL : new_none();
}

/* Add the time until now of the open user phases, as a step ends inside them. */
PyObject *method_account_user_phases(PyObject *self, PyObject *time) {
    HotFields *hot = (HotFields *)self;
    long long t = PyLong_AsLongLong(time);
    if (t == -1 && PyErr_Occurred()) return NULL;

    for (Py_ssize_t i = 0; i < hot->open_users; i++) {
        if (add_user(hot, hot->open_user_phases + i, t)) return NULL;

        hot->open_user_phases[i].start = t;
    }

    return new_none();
}

static PyObject *user_phase_enter(PyObject *self, PyObject *unused) {
    UserPhase *phase = (UserPhase *)self;
    (void)unused;
    if (begin_user(phase->hot, phase) && fail_open(phase->hot)) return NULL;

    Py_INCREF(self);
    return self;
}

static PyObject *user_phase_exit(PyObject *self, PyObject *const *args, Py_ssize_t n) {
    UserPhase *phase = (UserPhase *)self;
    (void)args;
    (void)n;
    return end_user(phase->hot, phase) ? none_after_error(phase->hot) : new_none();
}

static PyObject *user_phase_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    PyObject *hot;
    long long bucket, name_id;
    (void)kwargs;
    if (!PyArg_ParseTuple(args, "O!LL:UserPhase", hot_fields_type, &hot, &bucket, &name_id)) return NULL;

    UserPhase *phase = (UserPhase *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!phase) return NULL;

    assign((PyObject **)&phase->hot, hot);
    phase->bucket = bucket;
    phase->name_id = name_id;
    return (PyObject *)phase;
}

/* Like a hook, it keeps its clock until its end: the collector may clear what a cycle still uses. */
static int user_phase_traverse(PyObject *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(((UserPhase *)self)->hot);
    return 0;
}

static void user_phase_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    Py_CLEAR(((UserPhase *)self)->hot);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

PyTypeObject *make_user_phase_type(void) {
    static PyMethodDef methods[] = {
        {"__enter__", user_phase_enter, METH_NOARGS, NULL},
        {"__exit__", (PyCFunction)(void (*)(void))user_phase_exit, METH_FASTCALL, NULL},
        {NULL, NULL, 0, NULL},
    };
    static PyMemberDef members[] = {
        {"bucket", T_LONGLONG, offsetof(UserPhase, bucket), READONLY, NULL},
        {"name_id", T_LONGLONG, offsetof(UserPhase, name_id), READONLY, NULL},
        {NULL, 0, 0, 0, NULL},
    };
    static PyType_Slot slots[] = {
        {Py_tp_new, user_phase_new}, {Py_tp_traverse, user_phase_traverse}, {Py_tp_dealloc, user_phase_dealloc},
        {Py_tp_methods, methods}, {Py_tp_members, members}, {0, NULL},
    };
    static PyType_Spec spec = {"traceml.instrument.native._hot_path.UserPhase", sizeof(UserPhase), 0,
                               (unsigned int)(Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE), slots};
    return (PyTypeObject *)PyType_FromSpec(&spec);
}
