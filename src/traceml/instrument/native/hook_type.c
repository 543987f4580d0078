/* Hooks: callables that time a call of the training loop. Each has the usual path of its phase; in every other case it
 * calls `slow`, a Python function, with the same arguments. */
#include "hook.h"

#include <stddef.h>

static PyObject *method_type, *tag_name;

/* ---- backward ---- */

static inline int begin_backward(Hook *hook, PyObject *tensors, long long *t) {
    HotFields *hot = hook->hot;
    if (!LIKELY(hot->rows & hot->loss_mask)) {
        PyObject *result = PyObject_Vectorcall(hook->helper, &tensors, 1, NULL);
        Py_XDECREF(result);
        if (!result) return -1;
    }

    return read_clock(t) ? -1 : begin_phase(hot, PHASE_BACKWARD, *t);
}

static PyObject *call_backward(PyObject *self, PyObject *const *args, size_t nargsf, PyObject *names) {
    Hook *hook = (Hook *)self;
    HotFields *hot = hook->hot;
    if (!LIKELY(!hot->needs_slow_backward && count_of(nargsf) && is_usual(hot)))
        return call_slow(hook, args, nargsf, names);

    long long t, spent;
    int failed = begin_backward(hook, args[0], &t);
    if (!LIKELY(!failed) && fail_open(hot)) return NULL;

    PyObject *result = PyObject_Vectorcall(hook->original, args, nargsf, names);
    if (failed) return result;

    int status = end_phase(hot, result, PHASE_BACKWARD, &hot->backward_ns, t, &spent);
    if (status > 0) {
        hot->backwards++;
        hot->samples += hot->input_samples;
        hot->elements += hot->input_elements;
    }

    return checked(result, status);
}

/* ---- optimizer step ---- */

static PyObject *call_step(PyObject *self, PyObject *const *args, size_t nargsf, PyObject *names) {
    Hook *hook = (Hook *)self;
    HotFields *hot = hook->hot;
    long long ident = count_of(nargsf) ? (long long)(intptr_t)args[0] : 0;
    if (!LIKELY(!hot->step_call && ident == hot->last_optimizer && ident
                && none_for_null(hot->first_loader) == none_for_null(hot->usual_loader) && is_usual(hot)))
        return call_slow(hook, args, nargsf, names);

    long long t, spent;
    int failed = read_clock(&t) ? -1 : begin_phase(hot, PHASE_OPTIMIZER, t);
    if (!LIKELY(!failed) && fail_open(hot)) return NULL;

    PyObject *result = PyObject_Vectorcall(hook->original, args, nargsf, names);
    if (result) {
        hot->step_call = ident;
        assign(&hot->closing_trigger, hot->usual_trigger);
    }

    return failed ? result : checked(result, end_phase(hot, result, PHASE_OPTIMIZER, &hot->optimizer_ns, t, &spent));
}

/* ---- next batch of a loader ---- */

static inline int begin_wait(HotFields *hot, PyObject *loader, long long *t) {
    if (read_clock(t)) return -1;

    int status = loader == hot->closing_trigger ? commit_step(hot, *t) : call_method(hot, "boundary", *t, loader);
    return status ? -1 : begin_phase(hot, PHASE_INPUT_WAIT, *t);
}

static inline int note_batch(Hook *hook, PyObject *loader, PyObject *batch) {
    HotFields *hot = hook->hot;
    hot->batches++;
    if (none_for_null(hot->batch) == Py_None) {
        assign(&hot->batch, loader);
        if (none_for_null(hot->first_loader) == Py_None) assign(&hot->first_loader, loader);
    }

    if (!hot->inspects) return 0;

    PyObject *result = PyObject_Vectorcall(hook->helper, &batch, 1, NULL);
    Py_XDECREF(result);
    return result ? 0 : fail_open(hot);
}

/* The clock's `exhausted(loader, drain_ns)`, while the exception of the loader stays set. */
COLD static int note_end(HotFields *hot, PyObject *loader, long long spent) {
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    PyObject *result = PyObject_CallMethod((PyObject *)hot, "exhausted", "OL", loader, spent);
    Py_XDECREF(result);
    if (!result && fail_open(hot)) return -1;

    PyErr_Restore(type, error, traceback);
    return 0;
}

static PyObject *call_next(PyObject *self, PyObject *const *args, size_t nargsf, PyObject *names) {
    Hook *hook = (Hook *)self;
    HotFields *hot = hook->hot;
    if (!LIKELY(count_of(nargsf) == 1 && is_usual(hot))) return call_slow(hook, args, nargsf, names);

    PyObject *loader = PyObject_GetAttr(args[0], tag_name);
    if (!loader) return NULL;

    long long t, spent;
    int failed = begin_wait(hot, loader, &t), status = 0;
    PyObject *result = NULL;
    if (LIKELY(!failed) || !fail_open(hot)) result = PyObject_Vectorcall(hook->original, args, nargsf, names);
    else failed = 1;

    if (!failed) status = end_phase(hot, result, PHASE_INPUT_WAIT, &hot->input_ns, t, &spent);
    if (status > 0) status = result ? note_batch(hook, loader, result) : note_end(hot, loader, spent);
    Py_DECREF(loader);
    return checked(result, status);
}

/* ---- the type ---- */

static PyObject *(*call_of(const Hook *hook))(PyObject *, PyObject *const *, size_t, PyObject *) {
    switch (hook->phase) {
    case PHASE_FORWARD: return hook->length ? call_forward : NULL;
    case PHASE_BACKWARD: return hook->helper ? call_backward : NULL;
    case PHASE_OPTIMIZER: return call_step;
    case PHASE_INPUT_WAIT: return hook->helper ? call_next : NULL;
    default: return NULL;
    }
}

static PyObject *hook_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    PyObject *hot, *original, *slow, *helper = NULL, *module = NULL, *tensor_type = NULL;
    PyObject *numel = NULL, *is_grad_enabled = NULL;
    unsigned long long grad_mode = 0;
    int phase;
    if ((kwargs && PyDict_Size(kwargs))
        || !PyArg_ParseTuple(args, "O!iOO|OO(OOOK):Hook", hot_fields_type, &hot, &phase, &original, &slow, &helper,
                             &module, &tensor_type, &numel, &is_grad_enabled, &grad_mode))
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_TypeError, "Hook takes no keyword arguments");

    Hook *hook = (Hook *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!hook) return NULL;

    hook->phase = phase;
    assign((PyObject **)&hook->hot, hot);
    assign(&hook->original, original);
    assign(&hook->slow, slow);
    assign(&hook->helper, helper);
    assign(&hook->module, module);
    assign(&hook->tensor_type, tensor_type);
    assign(&hook->is_grad_enabled, is_grad_enabled);
    int failed = is_grad_enabled && prepare_forward(hook, numel, (size_t)grad_mode);
    hook->vectorcall = failed ? NULL : call_of(hook);
    if (hook->vectorcall) return (PyObject *)hook;

    Py_DECREF(hook);
    return failed ? NULL : PyErr_Format(PyExc_ValueError, "no hook for phase %d with these arguments", phase);
}

/* Like a function: `optimizer.step` is a bound method. */
static PyObject *hook_get(PyObject *self, PyObject *object, PyObject *type) {
    (void)type;
    if (object && object != Py_None) return PyObject_CallFunctionObjArgs(method_type, self, object, NULL);

    Py_INCREF(self);
    return self;
}

#define EACH_OBJECT(DO) \
    DO(hot) DO(original) DO(slow) DO(helper) DO(module) DO(tensor_type) DO(is_grad_enabled) DO(dict)

static int hook_traverse(PyObject *self, visitproc visit, void *arg) {
    Hook *hook = (Hook *)self;
    Py_VISIT(Py_TYPE(self));
#define VISIT(name) Py_VISIT(hook->name);
    EACH_OBJECT(VISIT)
#undef VISIT
    return 0;
}

/* What a call needs stays until the end: the collector may clear a hook that an object of its cycle still calls. */
static int hook_clear(PyObject *self) {
    Py_CLEAR(((Hook *)self)->dict);
    return 0;
}

static void hook_dealloc(PyObject *self) {
    Hook *hook = (Hook *)self;
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    if (hook->weakrefs) PyObject_ClearWeakRefs(self);
#define CLEAR(name) Py_CLEAR(hook->name);
    EACH_OBJECT(CLEAR)
#undef CLEAR
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyMemberDef members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(Hook, vectorcall), READONLY, NULL},
    {"__dictoffset__", T_PYSSIZET, offsetof(Hook, dict), READONLY, NULL},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Hook, weakrefs), READONLY, NULL},
    {"phase", T_INT, offsetof(Hook, phase), READONLY, NULL},
    {"original", T_OBJECT, offsetof(Hook, original), READONLY, NULL},
    {"module", T_OBJECT, offsetof(Hook, module), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef attributes[] = {
    {"__dict__", PyObject_GenericGetDict, PyObject_GenericSetDict, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyTypeObject *make_hook_type(void) {
    static PyType_Slot slots[] = {
        {Py_tp_new, hook_new}, {Py_tp_call, PyVectorcall_Call}, {Py_tp_descr_get, hook_get},
        {Py_tp_traverse, hook_traverse}, {Py_tp_clear, hook_clear}, {Py_tp_dealloc, hook_dealloc},
        {Py_tp_members, members}, {Py_tp_getset, attributes}, {0, NULL},
    };
    static PyType_Spec spec = {
        "traceml.instrument.native._hot_path.Hook", sizeof(Hook), 0,
        (unsigned int)(Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | VECTORCALL_FLAG
                       | METHOD_DESCRIPTOR_FLAG), slots};
    PyObject *types = PyImport_ImportModule("types");
    method_type = types ? PyObject_GetAttrString(types, "MethodType") : NULL;
    Py_XDECREF(types);
    tag_name = PyUnicode_InternFromString("_traceml_loader");
    return method_type && tag_name ? (PyTypeObject *)PyType_FromSpec(&spec) : NULL;
}
