# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""How a table of C functions travels through Python: in a capsule, by its name."""

from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_New


cdef object wrap(void *table, const char *name):
    return PyCapsule_New(table, name, NULL)


cdef grant_ports *grants_of(object owner) except NULL:
    return <grant_ports *>PyCapsule_GetPointer(owner.ports, "xvd.grant_ports")


cdef granter_ports *granter_of(object owner) except NULL:
    return <granter_ports *>PyCapsule_GetPointer(owner.ports, "xvd.granter_ports")


cdef event_ports *events_of(object owner) except NULL:
    return <event_ports *>PyCapsule_GetPointer(owner.ports, "xvd.event_ports")


cdef engine_ports *engine_of(object owner) except NULL:
    return <engine_ports *>PyCapsule_GetPointer(owner.ports, "xvd.engine_ports")


cdef stepper_ports *stepper_of(object owner) except NULL:
    return <stepper_ports *>PyCapsule_GetPointer(owner.ports, "xvd.stepper_ports")


cdef client_ports *client_of(object owner) except NULL:
    return <client_ports *>PyCapsule_GetPointer(owner.ports, "xvd.client_ports")
