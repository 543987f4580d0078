/* The hook around the outermost call of a model. */
#include "hook.h"

static PyObject *trains_names, *impl_name;

/* Call what is compiled, or as `Module.__call__` does: the script may have replaced the method. */
static inline PyObject *call_original(Hook *hook, PyObject *module, PyObject *const *args, size_t nargsf,
                                      PyObject *names) {
    if (hook->original != Py_None) return PyObject_Vectorcall(hook->original, args, nargsf, names);

    PyObject *method = PyObject_GetAttr(module, impl_name);
    if (!method) return NULL;

    PyObject *result = PyObject_Vectorcall(method, args, nargsf, names);
    Py_DECREF(method);
    return result;
}

COLD static PyObject *call_inside(Hook *hook, PyObject *module, PyObject *const *args, size_t nargsf, PyObject *names) {
    return call_original(hook, module, args, nargsf, names);
}

COLD static int measure(Hook *hook, PyObject *const *args, Py_ssize_t n, PyObject *names) {
    PyObject *positional = PyTuple_New(n), *keywords = PyDict_New(), *result = NULL;
    int status = positional && keywords ? 0 : -1;
    for (Py_ssize_t i = 0; !status && i < n; i++) {
        Py_INCREF(args[i]);
        status = PyTuple_SetItem(positional, i, args[i]);
    }

    for (Py_ssize_t i = 0; !status && names && i < PyTuple_Size(names); i++)
        status = PyDict_SetItem(keywords, PyTuple_GetItem(names, i), args[n + i]);

    PyObject *module = status ? NULL : PyWeakref_GetObject(hook->module);
    Py_XINCREF(module);
    if (module) result = PyObject_CallFunctionObjArgs(hook->helper, positional, keywords, module, NULL);
    Py_XDECREF(module);
    Py_XDECREF(positional);
    Py_XDECREF(keywords);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

/* 0: the size of a tensor is measured by the helper, which also handles what makes torch raise here. */
COLD static int is_unknown_size(void) {
    if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_Exception)) return -1;

    PyErr_Clear();
    return 0;
}

/* Whether the first argument has as many samples and elements as that of the forward before; -1 with an exception. (Its
 * shape costs twice as much, as torch makes a tuple of it.) */
static inline int has_known_size(Hook *hook, PyObject *const *args, Py_ssize_t n) {
    HotFields *hot = hook->hot;
    if (!n || (PyObject *)Py_TYPE(args[0]) != hook->tensor_type || none_for_null(hot->input_shape) == Py_None) return 0;
    if (!LIKELY(hook->length(args[0]) == hot->input_samples && hook->numel)) return is_unknown_size();

    PyObject *number = hook->numel(args[0], NULL);
    long long elements = number && PyLong_CheckExact(number) ? PyLong_AsLongLong(number) : -1;
    Py_XDECREF(number);
    return LIKELY(elements == hot->input_elements) ? 1 : is_unknown_size();
}

/* 1 or 0; -1 with an exception. */
COLD static int ask_for_gradients(Hook *hook) {
    PyObject *answer = PyObject_Vectorcall(hook->is_grad_enabled, NULL, 0, NULL);
    int is_true = answer ? PyObject_IsTrue(answer) : -1;
    Py_XDECREF(answer);
    return is_true;
}

COLD static int forward_begins(Hook *hook, long long t, PyObject *trains) {
    PyObject *method = PyObject_GetAttrString((PyObject *)hook->hot, "forward_begins"), *number = PyLong_FromLongLong(t);
    PyObject *values[] = {number, hook->module, trains}, *result = NULL;
    if (method && number) result = PyObject_Vectorcall(method, values, 2, trains_names);
    Py_XDECREF(method);
    Py_XDECREF(number);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

static inline int begin_forward(Hook *hook, PyObject *const *args, Py_ssize_t n, PyObject *names, long long *t) {
    HotFields *hot = hook->hot;
    int is_known = has_known_size(hook, args, n);
    if (is_known < 0 || (!LIKELY(is_known) && measure(hook, args, n, names)) || read_clock(t)) return -1;

    int trains = LIKELY(hook->grad_mode) ? hook->grad_mode() : ask_for_gradients(hook);
    if (trains < 0) return -1;

    int status = 0;
    if (!LIKELY(trains) || hot->closing_trigger == hot->check_forward)
        status = forward_begins(hook, *t, trains ? Py_True : Py_False);
    else if (hot->closing_trigger == hot->on_forward)
        status = commit_step(hot, *t);

    return status ? -1 : begin_phase(hot, PHASE_FORWARD, *t);
}

/* A forward inside one of these phases is part of it. */
static inline int is_part_of_phase(const HotFields *hot) {
    return hot->current == PHASE_FORWARD || hot->current == PHASE_BACKWARD || hot->current == PHASE_INPUT_WAIT;
}

/* Whether the caller, torch's `Module.__call__`, has this module as its `self`; 1 where that is not known. */
COLD static int is_called_for(PyObject *module) {
    PyObject *frame = (PyObject *)PyEval_GetFrame(), *locals = NULL, *self = NULL;
    if (frame) locals = PyObject_GetAttrString(frame, "f_locals");
    if (locals) self = PyMapping_GetItemString(locals, "self");
    int is_own = !self || self == module;
    Py_XDECREF(locals);
    Py_XDECREF(self);
    PyErr_Clear();
    return is_own;
}

/* Whether the hook is called for its own module: only the module's slot and this call refer to it, or the caller tells.
 * A module that has a copy of the `__dict__` calls it too. (Python 3.14 keeps flags in the upper half of the count.) */
static inline int is_own_call(PyObject *self, PyObject *module) {
    return LIKELY((unsigned int)Py_REFCNT(self) <= 2 && module != Py_None) || is_called_for(module);
}

static inline PyObject *call_timed(Hook *hook, PyObject *module, PyObject *const *args, size_t nargsf, PyObject *names) {
    HotFields *hot = hook->hot;
    long long t, spent;
    int failed = begin_forward(hook, args, count_of(nargsf), names, &t);
    if (!LIKELY(!failed) && fail_open(hot)) return NULL;

    PyObject *result = call_original(hook, module, args, nargsf, names);
    return failed ? result : checked(result, end_phase(hot, result, PHASE_FORWARD, &hot->forward_ns, t, &spent));
}

PyObject *call_forward(PyObject *self, PyObject *const *args, size_t nargsf, PyObject *names) {
    Hook *hook = (Hook *)self;
    HotFields *hot = hook->hot;
    PyObject *module = none_for_null(PyWeakref_GetObject(hook->module)), *result;
    if (!LIKELY(hook->original != Py_None || is_own_call(self, module))) return call_slow(hook, args, nargsf, names);

    Py_INCREF(module); /* in use until the call returns */
    if (LIKELY(is_usual(hot))) result = call_timed(hook, module, args, nargsf, names);
    else if (is_part_of_phase(hot)) result = call_inside(hook, module, args, nargsf, names);
    else result = call_slow(hook, args, nargsf, names);
    Py_DECREF(module);
    return result;
}

int prepare_forward(Hook *hook, PyObject *numel, size_t grad_mode) {
    if (!trains_names) trains_names = Py_BuildValue("(s)", "trains");
    if (!impl_name) impl_name = PyUnicode_InternFromString("_call_impl");
    PyObject *base = trains_names && impl_name ? PyObject_GetAttrString(hook->tensor_type, "__base__") : NULL;
    if (!base) return -1;

    if (PyType_Check(base)) hook->length = (lenfunc)PyType_GetSlot((PyTypeObject *)base, Py_mp_length);
    Py_DECREF(base); /* its subclass holds it */
    if (PyCFunction_Check(numel) && PyCFunction_GetFlags(numel) == METH_NOARGS)
        hook->numel = PyCFunction_GetFunction(numel);

    hook->grad_mode = (_Bool (*)(void))grad_mode;
    return 0;
}
