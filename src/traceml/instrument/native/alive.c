/* The objects of some types among all that the collector knows, some 300,000: compared by address, no code of a
 * metaclass runs. */
#include "hot_path.h"

#define MAX_TYPES ((size_t)1 << 24)

/* A table of addresses with one free place or more, so that each search ends. */
typedef struct {
    PyObject **types;
    size_t mask;
} TypeTable;

static PyObject **slot_of(const TypeTable *table, PyObject *type) {
    size_t place = ((size_t)type >> 4) * 0x9E3779B1u;
    while (table->types[place & table->mask] && table->types[place & table->mask] != type) place++;
    return &table->types[place & table->mask];
}

static int fill_table(TypeTable *table, PyObject *types) {
    Py_ssize_t count = PyTuple_Size(types);
    if (count < 0 || (size_t)count > MAX_TYPES) {
        if (count >= 0) PyErr_SetString(PyExc_ValueError, "too many types");
        return -1;
    }

    table->mask = 63;
    while (table->mask < 4 * (size_t)count) table->mask = 2 * table->mask + 1;
    table->types = PyMem_Calloc(table->mask + 1, sizeof(PyObject *));
    if (!table->types) {
        PyErr_NoMemory();
        return -1;
    }

    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *type = PyTuple_GetItem(types, i);
        *slot_of(table, type) = type;
    }

    return 0;
}

/* of_types(list, tuple of types) -> list of the objects of these types, not of subclasses */
PyObject *of_types(PyObject *module, PyObject *args) {
    PyObject *objects, *types;
    TypeTable table;
    (void)module;
    if (!PyArg_ParseTuple(args, "O!O!", &PyList_Type, &objects, &PyTuple_Type, &types)) return NULL;
    if (fill_table(&table, types)) return NULL;

    PyObject *found = PyList_New(0);
    for (Py_ssize_t i = 0; found && i < PyList_Size(objects); i++) {
        PyObject *each = PyList_GetItem(objects, i);
        if (*slot_of(&table, (PyObject *)Py_TYPE(each)) && PyList_Append(found, each)) Py_CLEAR(found);
    }

    PyMem_Free(table.types);
    return found;
}
