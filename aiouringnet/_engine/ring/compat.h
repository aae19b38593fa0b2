/* What io_uring needs and liburing 2.3 (Debian 12) lacks or keeps to C.
 *
 * The kernel's interface is stable, so a constant that an older header does
 * not name may be defined here; whether the running kernel knows it is found
 * out at run time.
 */
#ifndef AIOURINGNET_COMPAT_H
#define AIOURINGNET_COMPAT_H

#include <liburing.h>
#include <signal.h>
#include <string.h>
#include <time.h>

#ifndef IO_URING_VERSION_MAJOR /* named since liburing 2.4 */
#define IO_URING_VERSION_MAJOR 2
#define IO_URING_VERSION_MINOR 3
#endif

#ifndef IORING_ENTER_NO_IOWAIT /* Linux 6.15 */
#define IORING_ENTER_NO_IOWAIT (1U << 7)
#define IORING_FEAT_NO_IOWAIT (1U << 17)
#endif

/* Memory that the kernel shares.
 *
 * The rules are the kernel's (io_uring/io_uring.c begins with them, io_uring(7) and liburing's barrier.h say the same):
 * who writes a tail or a head releases, who reads the other side's acquires, and what only one side writes that side
 * reads as it is.  So
 *
 *   sq.ktail   ours: liburing releases it, with a poller, or plainly: io_uring_enter(2) reads it in this thread
 *   sq.khead   the kernel's: acquired with a poller; else it changes only while this thread is in the kernel
 *   cq.ktail   the kernel's: acquired, so that the entries before it are seen whole
 *   cq.khead   ours: released, so that no entry is written anew before we have copied it
 *   buffers    the tail of their ring is ours: io_uring_buf_ring_advance() releases it, and with it what was added
 *   sq.kflags  the kernel's, set by atomic operations; bits of their own, which order nothing
 *   cq.kflags  ours: one bit, that masks the eventfd
 *
 * Two stores that must not miss each other (we unmask and then look, the kernel posts and then looks) need a full
 * barrier between store and look, on both sides.  Ours is airn_full_fence(); io_uring_submit() has its own before it
 * reads SQ_NEED_WAKEUP.  The kernel's is the locked atomic_or() of SQ_TASKRUN on x86, and smp_mb() before it wakes
 * who waits for completions.  Where atomic_or() is no barrier (aarch64), the kernel might look at the mask before it
 * has shown SQ_TASKRUN: nobody here can order that for it, and a pass that another wake begins finds the work.
 */

/* The three bits that we look at say by themselves what is to be done: enter.  Nothing is read because of them. */
static inline unsigned airn_sq_flags(struct io_uring *ring)
{
	return __atomic_load_n(ring->sq.kflags, __ATOMIC_RELAXED);
}

/* TASKRUN, cleared before an enter that runs all deferred work: what is set behind it is news.  Atomically, since the
 * kernel sets bits meanwhile; and before the enter, which a full barrier makes sure of. */
static inline unsigned airn_forget_taskrun(struct io_uring *ring)
{
	if (!(airn_sq_flags(ring) & IORING_SQ_TASKRUN))
		return 0;
	return __atomic_fetch_and(ring->sq.kflags, ~IORING_SQ_TASKRUN, __ATOMIC_SEQ_CST) & IORING_SQ_TASKRUN;
}

static inline void airn_recall_taskrun(struct io_uring *ring, unsigned taskrun)
{
	__atomic_or_fetch(ring->sq.kflags, taskrun, __ATOMIC_SEQ_CST);
}

/* The acquire is not for this look, but for whoever takes entries because of it. */
static inline int airn_cq_ready(struct io_uring *ring)
{
	return io_uring_smp_load_acquire(ring->cq.ktail) != *ring->cq.khead;
}

/* Copies completions out and frees their places, so that callbacks may submit. */
static inline unsigned airn_take_cqes(struct io_uring *ring, struct io_uring_cqe *out, unsigned limit)
{
	unsigned head = *ring->cq.khead;
	unsigned tail = io_uring_smp_load_acquire(ring->cq.ktail);
	unsigned mask = ring->cq.ring_entries - 1;
	unsigned n = tail - head, i;

	if (n > limit)
		n = limit;
	for (i = 0; i < n; i++)
		memcpy(&out[i], &ring->cq.cqes[(head + i) & mask], 16);
	if (n) /* behind the copies */
		io_uring_smp_store_release(ring->cq.khead, head + n);
	return n;
}

/* Submissions that were prepared but that the kernel has not been given: no enter, no change of its head.  With
 * a poller, not been shown: both counts are liburing's own. */
static inline unsigned airn_unsubmitted(struct io_uring *ring)
{
	if (ring->flags & IORING_SETUP_SQPOLL)
		return ring->sq.sqe_tail - ring->sq.sqe_head;
	return io_uring_sq_ready(ring);
}

/* The i-th of those, without a poller: its head would move meanwhile. */
static inline __u64 airn_unsubmitted_data(struct io_uring *ring, unsigned i)
{
	return ring->sq.sqes[(*ring->sq.khead + i) & (ring->sq.ring_entries - 1)].user_data;
}

/* Make of an operation that the kernel has not been given one that does nothing, and ends: without a poller. */
static inline int airn_withdraw(struct io_uring *ring, __u64 user_data)
{
	unsigned i, found = 0, n = airn_unsubmitted(ring);
	unsigned head = *ring->sq.khead;
	struct io_uring_sqe *sqe;

	for (i = 0; i < n; i++) {
		sqe = &ring->sq.sqes[(head + i) & (ring->sq.ring_entries - 1)];
		if (sqe->user_data == user_data) {
			io_uring_prep_nop(sqe);
			sqe->flags = 0;
			sqe->user_data = user_data;
			found = 1;
		}
	}
	return found;
}

/* Whether the final completion of an operation waits to be taken. */
static inline int airn_has_ended(struct io_uring *ring, __u64 user_data)
{
	unsigned head = *ring->cq.khead;
	unsigned tail = io_uring_smp_load_acquire(ring->cq.ktail);
	unsigned mask = ring->cq.ring_entries - 1;

	for (; head != tail; head++) {
		struct io_uring_cqe *cqe = &ring->cq.cqes[head & mask];

		if (cqe->user_data == user_data && !(cqe->flags & IORING_CQE_F_MORE))
			return 1;
	}
	return 0;
}

/* Waits for a completion until a time of CLOCK_MONOTONIC, -1: for ever; 0, -ETIME, -EINTR or another error. */
static inline int airn_wait(struct io_uring *ring, long long deadline_ns)
{
	struct io_uring_getevents_arg arg = {0};
	struct __kernel_timespec left;
	struct timespec now;
	int code;

	if (deadline_ns >= 0) {
		clock_gettime(CLOCK_MONOTONIC, &now);
		deadline_ns -= now.tv_sec * 1000000000LL + now.tv_nsec;
		if (deadline_ns <= 0)
			return -ETIME;
		left.tv_sec = deadline_ns / 1000000000;
		left.tv_nsec = deadline_ns % 1000000000;
		arg.ts = (__u64)(unsigned long)&left;
	}
	code = io_uring_enter2(ring->ring_fd, 0, 1, IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG | IORING_ENTER_NO_IOWAIT,
			       (sigset_t *)&arg, sizeof(arg));
	return code < 0 ? code : 0;
}

/* Between a store that unmasks and the look at what came while it was masked: a processor may else look first. */
static inline void airn_full_fence(void)
{
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
}

#endif
