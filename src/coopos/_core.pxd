# What the compiled modules share: how an error is made, and how a greenlet gives way to its hub.

cdef enum:
    READ = 1
    WRITE = 2

cdef object os_error(int err, str call, object subject)
cdef object give_way(object hub, object current)
cdef object wrong_switch(object came_back, str what)
