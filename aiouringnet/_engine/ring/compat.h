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

static inline unsigned airn_sq_flags(struct io_uring *ring)
{
	return __atomic_load_n(ring->sq.kflags, __ATOMIC_RELAXED);
}

/* TASKRUN, cleared before an enter that runs all deferred work: what is set behind it is news. */
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
	if (n)
		io_uring_smp_store_release(ring->cq.khead, head + n);
	return n;
}

/* Submissions that were prepared but that the kernel has not been given; with
 * a poller, not been shown. */
static inline unsigned airn_unsubmitted(struct io_uring *ring)
{
	if (ring->flags & IORING_SETUP_SQPOLL)
		return ring->sq.sqe_tail - ring->sq.sqe_head;
	return io_uring_sq_ready(ring);
}

/* The i-th of those. */
static inline __u64 airn_unsubmitted_data(struct io_uring *ring, unsigned i)
{
	return ring->sq.sqes[(*ring->sq.khead + i) & (ring->sq.ring_entries - 1)].user_data;
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

static inline void airn_full_fence(void)
{
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
}

#endif
