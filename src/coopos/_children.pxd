# What _wait and _forking need of the children's records.

from posix.types cimport id_t

from coopos._posix cimport Report, idtype_t, ino_t

cdef enum:
    ALIVE = 0      # as far as anybody has asked
    ENDED = 1      # collected here; the status waits for someone to claim it
    CLAIMED = 2    # somebody has got it
    LOST = 3       # somebody else has collected it, and the kernel doesn't tell

cdef class Child:
    cdef readonly int pid
    cdef str told_by
    cdef Report report             # once it has ended
    cdef int group                 # the process group it died in
    cdef int state
    cdef bint is_stolen            # by somebody else in this process, who has collected it
    cdef bint is_watched           # collected as soon as it ends, and the status kept until claimed
    cdef ino_t inode               # of its pidfd, where that is its own; 0
    cdef object home               # the Watch in the loop where it was watched first
    cdef list watches              # a Watch in each loop that waits for it
    cdef int born                  # generation

    cdef bint is_parents(self) except -1
    cdef bint wait(self) except -1
    cdef ino_t pidfd_inode(self) except? 0
    cdef int pidfd(self) except -2
    cdef int forget(self, watch) except -1
    cdef int ask(self, int options, Report *report) except -2
    cdef bint collect(self, bint claims, Report *stop, bint is_dead=*) except -1
    cdef int collected(self, const Report *report) except -1
    cdef int tell_others(self) except -1
    cdef int lose(self) except -1
    cdef int drop(self) except -1
    cdef int claim(self) except -1
    cdef int settle(self) except -1
    cdef int add_callback(self, callback, loop, bint ref) except -1

cdef dict children
cdef dict ended

cdef object lost_child(Child child)
cdef int ask_now(idtype_t idtype, id_t id, int options, Report *report) except -2
cdef bint is_used_again(int pid) except -1
cdef int wait_for_news(idtype_t idtype, id_t id, int options) except -1

cdef int note_new(Child child, int pid) except -1
cdef bint take_note(Child child) except -1
cdef int leave_parents() except -1
cdef int forget_parent() except -1
