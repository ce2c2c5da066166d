# What _semaphores takes from it.

from coopos._posix cimport sem_t

cdef bint wait_semaphore(sem_t *semaphore, object subject) except -1
