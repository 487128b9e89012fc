"""Whether sharing a call pays at the moment: what every call of several threads tells, and what the next does with it.

Design
------
1. A call of several threads ends when the last has come and gone, even if the others have left it nothing to do. A
   thread may come late: it sleeps, or its processor is busy with another process, or with a thread of BLAS or of
   another OpenMP that spins while it waits for work. That costs microseconds to milliseconds, and nobody can tell
   beforehand.
2. So every call tells afterwards what it lost: how much longer it took than one thread would have taken alone. That is
   known from how long the threads took for their shares.
3. The first loss may be what it took to wake the other threads. If a second one follows before the first has become
   small against the time that has passed, the thread works alone for `PATIENCE` times what both lost: no more than one
   part in so many is ever lost, whatever the others do.
4. A call that is so long that it would have gained in spite of such a delay is shared in the meantime, too.
5. Sharing also costs what it does to others: threads that are woken for a short call are on the processors when BLAS
   wants them. So a short call is shared only if it follows another so closely that the threads are still awake: in a
   loop of such calls, not in one where matrix products come between them.
6. Linux may wake a thread on the calling thread's own processor, though others are idle, and leave it there for some
   milliseconds: calls of three milliseconds, half a millisecond apart, took as long with two threads as with one. So
   such a thread leaves that processor, and may use any other that the calling thread may use.
7. What is learnt belongs to the calling thread, as OpenMP's threads do. It never changes a result: no bit depends on
   the number of threads.

Rejected: a threshold. After a matrix product a call of 17 us loses 35 us by a second thread, in a loop of such calls it
gains 4 us.
"""
from libc.math cimport HUGE_VAL

from fastce._cpu.prefetch cimport CACHE_LINE

cdef extern from "host/threads.h" nogil:
    ctypedef struct Experience "fastce_experience":
        double stop
        double lost
        double grace
        double delay
        double until
    const double SECONDS_PER_NUMBER "FASTCE_SECONDS_PER_NUMBER"
    const double AWAKE "FASTCE_AWAKE"
    int this_processor "fastce_processor"()
    ctypedef struct Thread "fastce_thread":  # a number or a pointer
        pass
    Thread this_thread "fastce_this_thread"()
    void leave "fastce_leave"(int processor, Thread caller)
    double clock_seconds "fastce_clock"()
    Experience* experience_of_thread "fastce_experience_of_thread"()


# What a thread has done in a call: a cache line of its own.
cdef struct Progress:
    double start  # the clock's time when it began
    double stop   # and when it had done the last chunk so far
    Py_ssize_t n_chunks
    char padding[CACHE_LINE - 24]

cdef enum:
    # Numbers below which no team pays, 64 x 256 float32 took as long with two threads as with one; and below which it
    # does not pay to wake one.
    SERIAL_NUMBERS = 16384
    SHORT_NUMBERS = 524288
    PATIENCE = 50
    SIGNIFICANT = 8  # a loss is no less than such a part of what the calling thread alone would take


cdef inline bint pays_to_share(Py_ssize_t n_numbers) noexcept nogil:
    """Return whether so many numbers are worth the other threads, if nobody has said how many there should be."""
    cdef Experience* experience
    cdef double now
    if n_numbers < SERIAL_NUMBERS:
        return False
    experience = experience_of_thread()
    now = clock_seconds()
    if n_numbers < SHORT_NUMBERS and now - experience.stop > AWAKE:
        return False
    # Two threads save half, more of them more.
    return now >= experience.until or experience.delay < n_numbers * SECONDS_PER_NUMBER / 2


cdef inline void note_end(Py_ssize_t n_numbers) noexcept nogil:
    """Note when a call of the calling thread alone has ended."""
    if n_numbers >= SERIAL_NUMBERS:
        experience_of_thread().stop = clock_seconds()


cdef inline void begin_chunk(
    Progress* progress, int thread, double start, int processor, Thread caller
) noexcept nogil:
    """Begin a thread's next chunk; the calling thread, number 0, began the call then, on that processor."""
    if progress[thread].n_chunks > 0:
        return
    if thread > 0:
        leave(processor, caller)
    progress[thread].start = clock_seconds() if thread > 0 else start


cdef inline void end_chunk(Progress* progress, int thread) noexcept nogil:
    progress[thread].stop = clock_seconds()
    progress[thread].n_chunks += 1


cdef inline void learn(double start, const Progress* progress, Py_ssize_t n_chunks, int n_threads) noexcept nogil:
    """Learn from a call that has just ended: when it began, and what each thread has done."""
    cdef Experience* experience = experience_of_thread()
    cdef double now = clock_seconds()
    cdef double alone = HUGE_VAL, lost
    cdef int j
    # The thread that was fastest has not been kept from its processor.
    for j in range(n_threads):
        if progress[j].n_chunks > 0:
            alone = min(alone, (progress[j].stop - progress[j].start) / progress[j].n_chunks * n_chunks)
    lost = now - start - alone
    experience.stop = now
    if lost * SIGNIFICANT <= alone:
        return
    if now >= experience.grace:
        experience.lost = lost
        experience.grace = now + PATIENCE * lost
    else:
        experience.delay = lost + alone * (n_threads - 1) / n_threads
        experience.until = now + PATIENCE * (lost + experience.lost)
        experience.grace = 0
