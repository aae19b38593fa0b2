/*
 * Load generator: N connections play ping-pong with an echo server.
 *
 * One thread, one epoll instance, edge-triggered. Each connection keeps
 * `depth` messages of `size` bytes in flight; every complete echo is one
 * request and is answered at once by the next message. By default epoll_wait
 * spins with a zero timeout, so the client never sleeps and its wake-up
 * latency does not hide the server's; --sleep waits instead, which leaves the
 * core to somebody else (an SQPOLL thread on a machine with two cores).
 *
 * The run goes through the phases of `enum phase`. The server's CPU time
 * (--pid) is sampled here and not by the harness, because only this process
 * can take the request count and the CPU time at the same instant. The kernel
 * updates a running task's CPU time on its tick only, so both ends of the
 * measured window wait for the next update (at most MAX_ALIGN_NS): what is
 * counted is then exact rather than good to a tick.
 *
 * At the end every message still in flight is awaited: each connection must
 * have got back exactly the bytes that it sent, or it counts as an error.
 *
 * Received bytes are counted and discarded by the kernel (MSG_TRUNC) rather than
 * copied, so that the client is not the limit where messages are large, and so
 * that the server's pages are not dragged through another core's cache, which
 * no network card does either. --verify copies and compares them.
 *
 * With --udp each connection is a connected UDP socket and a message a datagram.
 * One that is lost is missed at the end, as an error; until then its connection
 * is silent.
 *
 * All socket input and output goes through the channel_* functions, where
 * compiling with -DWITH_TLS puts TLS (--tls). Handshakes are done before the
 * warm-up begins. The client verifies no certificate.
 *
 * With --reconnect each connection sends one message only, waits until the
 * server has answered its end (over TLS its close_notify, too) by closing, and
 * is replaced by a new one: a request is then a connection, over TLS with its
 * handshake, and one echo. --resume offers the session of the connection
 * before; a server that does not take it makes an error.
 *
 * With --broadcast the server sends what one connection says to all of them.
 * The first one speaks, again as soon as everybody has heard it all: a request
 * is one message that has reached every connection, and its latency the last
 * one's.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#ifdef WITH_TLS
#include "tls_wire.h"
#endif

#define NS_PER_SECOND 1000000000ull
#define MAX_EVENTS 1024
#define MAX_CONNECTIONS 65536
#define MAX_IN_FLIGHT_BYTES (64u << 20)
#define RECV_BUFFER_BYTES (256u << 10)
#define MAX_DATAGRAM_BYTES 65507u
#define MAX_ALIGN_NS (20 * NS_PER_SECOND / 1000)
#define DRAIN_NS (2 * NS_PER_SECOND)
#define HANDSHAKES_NS (10 * NS_PER_SECOND)
/* Connecting, handshakes and draining, on top of the two periods the user gave. */
#define GRACE_SECONDS 20

/* ---- options ---------------------------------------------------------- */

struct options {
    const char *host;
    const char *unix_path;
    int port;
    int connections;
    size_t size;
    unsigned depth;
    double warmup_seconds;
    double seconds;
    pid_t server_pid;
    bool sleeping;
    bool verify;
    bool tls;
    int tls_version;      /* 0: what is negotiated */
    bool reconnect;
    bool resume;
    bool broadcast;
    bool udp;
};

static void die(const char *what)
{
    perror(what);
    exit(2);
}

static void usage(FILE *out)
{
    fprintf(out,
            "usage: loadgen --port PORT | --unix PATH [options]\n"
            "  --host ADDR         IPv4 address of the server (127.0.0.1)\n"
            "  --connections N     connections kept busy (1)\n"
            "  --size BYTES        bytes of one message (64)\n"
            "  --depth N           messages in flight per connection (1)\n"
            "  --warmup SECONDS    load before the measured window (0.3)\n"
            "  --seconds SECONDS   length of the measured window (1)\n"
            "  --pid PID           server whose CPU time and memory to sample\n"
            "  --sleep             sleep in epoll_wait instead of spinning\n"
            "  --reconnect         a new connection for each message\n"
            "  --broadcast         the server sends what the first connection says to all\n"
            "  --udp               UDP; a message is a datagram\n"
            "  --verify            copy and compare every echo instead of counting its bytes\n"
#ifdef WITH_TLS
            "  --tls               TLS; certificates are not verified\n"
            "  --tls-version V     1.2 or 1.3 (what is negotiated)\n"
            "  --resume            let --reconnect's handshakes resume the session of the one before\n"
#endif
            "Prints START and END around the measured window, then one line of JSON.\n");
}

static double positive(const char *text, const char *name, double low, double high)
{
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end || value < low || value > high) {
        fprintf(stderr, "loadgen: --%s must be from %g to %g\n", name, low, high);
        exit(2);
    }
    return value;
}

#ifdef WITH_TLS
static int parse_tls_version(const char *text)
{
    if (strcmp(text, "1.2") == 0)
        return TLS1_2_VERSION;
    if (strcmp(text, "1.3") == 0)
        return TLS1_3_VERSION;
    fprintf(stderr, "loadgen: --tls-version must be 1.2 or 1.3\n");
    exit(2);
}
#endif

static struct options parse_options(int argc, char **argv)
{
    static const struct option longs[] = {
        {"host", 1, 0, 'h'},    {"port", 1, 0, 'p'},   {"unix", 1, 0, 'u'},
        {"connections", 1, 0, 'n'}, {"size", 1, 0, 's'}, {"depth", 1, 0, 'd'},
        {"warmup", 1, 0, 'w'},  {"seconds", 1, 0, 't'}, {"pid", 1, 0, 'P'},
        {"sleep", 0, 0, 'z'},   {"verify", 0, 0, 'v'}, {"help", 0, 0, 'H'},
        {"reconnect", 0, 0, 'N'}, {"broadcast", 0, 0, 'B'}, {"udp", 0, 0, 'U'},
#ifdef WITH_TLS
        {"tls", 0, 0, 'T'},     {"tls-version", 1, 0, 'V'},
        {"resume", 0, 0, 'R'},
#endif
        {0, 0, 0, 0},
    };
    struct options o = {.host = "127.0.0.1", .connections = 1, .size = 64, .depth = 1,
                        .warmup_seconds = 0.3, .seconds = 1};
    int c;
    while ((c = getopt_long(argc, argv, "", longs, NULL)) != -1) {
        switch (c) {
        case 'h': o.host = optarg; break;
        case 'u': o.unix_path = optarg; break;
        case 'p': o.port = (int)positive(optarg, "port", 1, 65535); break;
        case 'n': o.connections = (int)positive(optarg, "connections", 1, MAX_CONNECTIONS); break;
        case 's': o.size = (size_t)positive(optarg, "size", 1, MAX_IN_FLIGHT_BYTES); break;
        case 'd': o.depth = (unsigned)positive(optarg, "depth", 1, 65536); break;
        case 'w': o.warmup_seconds = positive(optarg, "warmup", 0, 600); break;
        case 't': o.seconds = positive(optarg, "seconds", 0.01, 600); break;
        case 'P': o.server_pid = (pid_t)positive(optarg, "pid", 1, 1 << 22); break;
        case 'z': o.sleeping = true; break;
        case 'v': o.verify = true; break;
        case 'T': o.tls = true; break;
#ifdef WITH_TLS
        case 'V': o.tls_version = parse_tls_version(optarg); break;
#endif
        case 'N': o.reconnect = true; break;
        case 'B': o.broadcast = true; break;
        case 'U': o.udp = true; break;
        case 'R': o.resume = true; break;
        case 'H': usage(stdout); exit(0);
        default: usage(stderr); exit(2);
        }
    }
    bool lacks_tls = (o.resume || o.tls_version) && !o.tls;
    if (!o.port == !o.unix_path || optind != argc || lacks_tls || (o.resume && !o.reconnect)) {
        usage(stderr);
        exit(2);
    }
    if ((o.reconnect || o.broadcast) && (o.depth > 1 || (o.reconnect && o.broadcast))) {
        fprintf(stderr, "loadgen: --reconnect and --broadcast have one message at a time\n");
        exit(2);
    }
    if (o.udp && (o.tls || o.unix_path || o.reconnect || o.broadcast || o.size > MAX_DATAGRAM_BYTES)) {
        fprintf(stderr, "loadgen: --udp is for echoes of up to %u bytes\n", MAX_DATAGRAM_BYTES);
        exit(2);
    }
    if (o.size * o.depth > MAX_IN_FLIGHT_BYTES) {
        fprintf(stderr, "loadgen: size x depth must be at most %u\n", MAX_IN_FLIGHT_BYTES);
        exit(2);
    }
    return o;
}

/* ---- time and latency histogram --------------------------------------- */

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * NS_PER_SECOND + (uint64_t)t.tv_nsec;
}

/* Log-linear: 128 linear steps per power of two, so within 0.8 % anywhere. */
#define STEP_BITS 7
#define STEPS (1u << STEP_BITS)
#define BUCKETS ((64 - STEP_BITS + 1) * STEPS)

struct histogram {
    uint64_t counts[BUCKETS];
    uint64_t total;
    uint64_t max_ns;
};

static unsigned bucket_of(uint64_t ns)
{
    if (ns < STEPS)
        return (unsigned)ns;
    unsigned shift = 63u - (unsigned)__builtin_clzll(ns) - STEP_BITS;
    return (shift + 1) * STEPS + (unsigned)(ns >> shift) - STEPS;
}

static double bucket_middle(unsigned bucket)
{
    if (bucket < STEPS)
        return bucket;
    unsigned shift = bucket / STEPS - 1;
    double width = (double)(1ull << shift);
    return (bucket % STEPS + STEPS) * width + width / 2;
}

static void histogram_add(struct histogram *h, uint64_t ns)
{
    h->counts[bucket_of(ns)]++;
    h->total++;
    if (ns > h->max_ns)
        h->max_ns = ns;
}

static double percentile_us(const struct histogram *h, double fraction)
{
    uint64_t wanted = (uint64_t)((double)h->total * fraction);
    uint64_t seen = 0;
    for (unsigned i = 0; i < BUCKETS; i++) {
        seen += h->counts[i];
        if (h->counts[i] && seen > wanted)
            return bucket_middle(i) / 1000;
    }
    return (double)h->max_ns / 1000;
}

/* ---- the server, seen from outside ------------------------------------ */

struct sample {
    uint64_t main_ns;   /* CPU time of the thread that runs the event loop */
    uint64_t wait_ns;   /* time in which that thread was ready and another had the core */
    uint64_t all_ns;    /* of all threads of the process */
    uint64_t sqpoll_ns; /* of the kernel's SQPOLL threads (iou-sqp-*) */
    uint64_t rss_bytes;
};

struct schedstat {
    uint64_t run_ns;
    uint64_t wait_ns;
};

/* Zeros when the thread has gone. */
static struct schedstat read_schedstat(int fd)
{
    struct schedstat s = {0};
    char text[128], *end;
    ssize_t n = pread(fd, text, sizeof text - 1, 0);
    if (n <= 0)
        return s;
    text[n] = 0;
    s.run_ns = strtoull(text, &end, 10);
    s.wait_ns = strtoull(end, NULL, 10);
    return s;
}

static int open_task_file(pid_t pid, const char *tid, const char *name)
{
    char path[320];
    snprintf(path, sizeof path, "/proc/%d/task/%s/%s", (int)pid, tid, name);
    return open(path, O_RDONLY | O_CLOEXEC);
}

static bool is_sqpoll_thread(pid_t pid, const char *tid)
{
    char name[32] = "";
    int fd = open_task_file(pid, tid, "comm");
    if (fd < 0)
        return false;
    ssize_t n = read(fd, name, sizeof name - 1);
    close(fd);
    return n > 0 && strncmp(name, "iou-sqp-", 8) == 0;
}

static uint64_t read_rss_bytes(pid_t pid)
{
    char path[64];
    unsigned long long size_pages, rss_pages = 0;
    snprintf(path, sizeof path, "/proc/%d/statm", (int)pid);
    FILE *f = fopen(path, "re");
    if (!f)
        return 0;
    if (fscanf(f, "%llu %llu", &size_pages, &rss_pages) != 2)
        rss_pages = 0;
    fclose(f);
    return rss_pages * (uint64_t)sysconf(_SC_PAGESIZE);
}

static struct sample take_sample(pid_t pid)
{
    struct sample s = {0};
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/task", (int)pid);
    DIR *tasks = opendir(path);
    if (!tasks)
        return s;
    for (struct dirent *e; (e = readdir(tasks));) {
        int fd = isdigit((unsigned char)e->d_name[0]) ? open_task_file(pid, e->d_name, "schedstat") : -1;
        if (fd < 0)
            continue;
        struct schedstat stat = read_schedstat(fd);
        close(fd);
        s.all_ns += stat.run_ns;
        if (atoi(e->d_name) == pid) {
            s.main_ns = stat.run_ns;
            s.wait_ns = stat.wait_ns;
        } else if (is_sqpoll_thread(pid, e->d_name)) {
            s.sqpoll_ns += stat.run_ns;
        }
    }
    closedir(tasks);
    s.rss_bytes = read_rss_bytes(pid);
    return s;
}

/* ---- connections ------------------------------------------------------ */

struct connection {
    int fd;
    size_t unsent;        /* bytes of queued messages that the kernel has not taken */
    size_t send_offset;   /* where in a message the next byte to send lies */
    size_t recv_offset;   /* where in a message the next byte to receive lies */
    unsigned in_flight;   /* messages queued and not yet echoed */
    unsigned oldest;      /* index in sent_at of the oldest of them */
    int recv_flags;
    bool whole;           /* a receive brings one datagram */
    bool drained;         /* the last receive has emptied the socket: the next byte is a new edge */
    bool shaken;          /* the handshake is done; without TLS from the beginning */
    bool closing;         /* close_notify is sent, the server's end is awaited */
    uint64_t *sent_at;    /* depth entries */
#ifdef WITH_TLS
    SSL *ssl;
    SSL_SESSION *session; /* what the next handshake offers, or NULL */
    char *rest;           /* records that the kernel has not taken */
    size_t rest_start;
    size_t rest_end;
#endif
};

static int connect_inet(const struct options *o)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)o->port)};
    if (inet_pton(AF_INET, o->host, &a.sin_addr) != 1) {
        fprintf(stderr, "loadgen: --host must be an IPv4 address\n");
        exit(2);
    }
    int one = 1, fd = socket(AF_INET, (o->udp ? SOCK_DGRAM : SOCK_STREAM) | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&a, sizeof a) < 0)
        die("loadgen: connect");
    if (!o->udp && setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one) < 0)
        die("loadgen: TCP_NODELAY");
    return fd;
}

static int connect_unix(const char *unix_path)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    if (strlen(unix_path) >= sizeof a.sun_path) {
        fprintf(stderr, "loadgen: --unix path is too long\n");
        exit(2);
    }
    strcpy(a.sun_path, unix_path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&a, sizeof a) < 0)
        die("loadgen: connect");
    return fd;
}

#ifdef WITH_TLS
static SSL_CTX *tls; /* NULL: no TLS */

static void prepare_tls(const struct options *o)
{
    if (!o->tls)
        return;
    tls = tls_context(TLS_client_method());
    SSL_CTX_set_verify(tls, SSL_VERIFY_NONE, NULL);
    if (!SSL_CTX_set_min_proto_version(tls, o->tls_version) ||
        !SSL_CTX_set_max_proto_version(tls, o->tls_version))
        tls_die("loadgen: --tls-version");
}

/* Sends the records that the kernel did not take before; false while it does not, or on an error (errno). */
static bool tls_send_rest(struct connection *c)
{
    if (!c->rest)
        return true;
    ssize_t n = send(c->fd, c->rest + c->rest_start, c->rest_end - c->rest_start, MSG_NOSIGNAL);
    if (n < 0)
        return false;
    c->rest_start += (size_t)n;
    if (c->rest_start < c->rest_end) {
        errno = EAGAIN;
        return false;
    }
    free(c->rest);
    c->rest = NULL;
    return true;
}

/* Sends what OpenSSL has just written, and keeps what the kernel does not take. */
static bool tls_send_output(struct connection *c)
{
    size_t sent = 0, len = wire.output_len;
    wire.output_len = 0;
    if (!c->rest && len) {
        ssize_t n = send(c->fd, wire.output, len, MSG_NOSIGNAL);
        if (n < 0 && errno != EAGAIN)
            return false;
        sent = n < 0 ? 0 : (size_t)n;
    }
    if (sent == len)
        return true;
    /* A message waits until its predecessor's rest has gone, but an alert or a key update does not. */
    size_t kept = c->rest ? c->rest_end - c->rest_start : 0;
    char *rest = malloc(kept + len - sent);
    if (!rest)
        die("loadgen: memory");
    if (kept)
        memcpy(rest, c->rest + c->rest_start, kept);
    memcpy(rest + kept, wire.output + sent, len - sent);
    free(c->rest);
    c->rest = rest;
    c->rest_start = 0;
    c->rest_end = kept + len - sent;
    return true;
}

/* The first flight leaves at once; what goes wrong shows when the connection is used. */
static void tls_open(struct connection *c)
{
    c->ssl = tls_new(tls);
    SSL_set_connect_state(c->ssl);
    if (c->session)
        SSL_set_session(c->ssl, c->session);
    SSL_do_handshake(c->ssl);
    tls_send_output(c);
}

static ssize_t tls_failed(void)
{
    fprintf(stderr, "loadgen: %s\n", tls_reason());
    errno = EPROTO;
    return -1;
}

static ssize_t tls_send(struct connection *c, const char *data, size_t len)
{
    if (!tls_send_rest(c))
        return -1;
    int n = SSL_write(c->ssl, data, (int)len);
    if (!tls_send_output(c))
        return -1;
    if (n > 0)
        return n;
    /* The handshake comes first. */
    if (SSL_get_error(c->ssl, n) != SSL_ERROR_WANT_READ)
        return tls_failed();
    errno = EAGAIN;
    return -1;
}

/* One receive and all that is in it; the handshake is done here, too. */
static ssize_t tls_recv(struct connection *c, char *data, size_t len)
{
    /* So much less than asked for that the rest of a record from before has its place. */
    static char received[RECV_BUFFER_BYTES - MAX_RECORD_BYTES];
    ssize_t n = recv(c->fd, received, sizeof received, 0);
    c->drained = n < (ssize_t)sizeof received;
    if (n <= 0)
        return n;
    wire.input = received;
    wire.input_len = (size_t)n;
    size_t got = 0;
    int status = 1;
    while (wire.input_len && (status = SSL_read(c->ssl, data + got, (int)(len - got))) > 0)
        got += (size_t)status;
    wire.input_len = 0; /* of a connection that failed, nobody else's */
    bool goes_on = status > 0 || SSL_get_error(c->ssl, status) == SSL_ERROR_WANT_READ;
    bool ended = SSL_get_shutdown(c->ssl) & SSL_RECEIVED_SHUTDOWN;
    if (!tls_send_output(c))
        return -1;
    if (!goes_on && !ended)
        return tls_failed();
    c->shaken = SSL_is_init_finished(c->ssl);
    if (got)
        return (ssize_t)got;
    errno = EAGAIN;
    return ended ? 0 : -1;
}

/* False when a session was offered and not resumed, or when there is none for the next connection to offer. */
static bool tls_keep_session(struct connection *c)
{
    bool resumed = !c->session || SSL_session_reused(c->ssl);
    SSL_SESSION_free(c->session);
    /* TLS 1.3 sends its tickets after the handshake, so only the echo proves that they are here. */
    c->session = SSL_get1_session(c->ssl);
    return resumed && c->session && SSL_SESSION_is_resumable(c->session);
}

static void tls_close(struct connection *c)
{
    SSL_free(c->ssl);
    free(c->rest);
    c->ssl = NULL;
    c->rest = NULL;
}
#endif

static void channel_open(struct connection *c, const struct options *o)
{
    c->fd = o->unix_path ? connect_unix(o->unix_path) : connect_inet(o);
    if (fcntl(c->fd, F_SETFL, O_NONBLOCK) < 0)
        die("loadgen: O_NONBLOCK");
    /* Only TCP takes MSG_TRUNC to mean "count it and throw it away". */
    c->recv_flags = o->verify || o->unix_path || o->udp ? 0 : MSG_TRUNC;
    c->whole = o->udp;
    c->shaken = !o->tls;
    c->closing = false;
#ifdef WITH_TLS
    if (tls)
        tls_open(c);
#endif
}

static ssize_t channel_send(struct connection *c, const char *data, size_t len)
{
#ifdef WITH_TLS
    if (tls)
        return tls_send(c, data, len);
#endif
    return send(c->fd, data, len, MSG_NOSIGNAL);
}

/* What an earlier channel_send has taken and not sent; false with errno when it is not all sent. */
static bool channel_flush(struct connection *c)
{
#ifdef WITH_TLS
    if (tls)
        return tls_send_rest(c);
#endif
    (void)c;
    return true;
}

static ssize_t channel_recv(struct connection *c, char *data, size_t len)
{
#ifdef WITH_TLS
    if (tls)
        return tls_recv(c, data, len);
#endif
    ssize_t n = recv(c->fd, data, len, c->recv_flags);
    c->drained = c->whole ? n < 0 : n < (ssize_t)len;
    return n;
}

/* Says that nothing more will be sent; false on an error (errno). */
static bool channel_shutdown(struct connection *c)
{
    c->closing = true;
#ifdef WITH_TLS
    if (tls) {
        SSL_shutdown(c->ssl);
        if (!tls_send_output(c))
            return false;
    }
#endif
    return shutdown(c->fd, SHUT_WR) == 0;
}

static void channel_close(struct connection *c)
{
    close(c->fd);
    c->fd = -1;
#ifdef WITH_TLS
    if (tls)
        tls_close(c);
#endif
}

/* ---- the run ---------------------------------------------------------- */

enum phase {
    SHAKING,        /* TLS: until all handshakes are done */
    WARMING,        /* load without counting */
    ALIGNING_START, /* warm; waiting for the server's CPU time to be updated */
    MEASURING,
    ALIGNING_END,   /* still counting; waiting for the update that ends the window */
    DRAINING,       /* nothing new is sent; outstanding echoes are awaited */
    DONE,
};

struct run {
    struct options options;
    struct connection *connections;
    int epoll_fd;
    int alive;
    int idle;                /* alive connections with nothing in flight, while draining */
    int heard;               /* --broadcast: connections that have received the message */
    char *messages;          /* depth + 1 copies of the message, so any send is contiguous */
    char *received;

    enum phase phase;
    uint64_t phase_deadline_ns;
    int schedstat_fd;        /* of the server's main thread, or -1 */
    uint64_t schedstat_ns;   /* its value when alignment began */

    uint64_t started_ns, ended_ns;
    struct sample at_start, at_end;
    uint64_t own_wait_start_ns, own_wait_ns;  /* time in which we were ready and another had the core */
    uint64_t requests;       /* in the window */
    uint64_t all_requests;
    uint64_t errors;
    struct histogram latency;
};

static void drop(struct run *r, struct connection *c, const char *why)
{
    fprintf(stderr, "loadgen: connection %d: %s\n", (int)(c - r->connections), why);
    channel_close(c);
    r->errors++;
    /* A broadcast that one of them cannot hear ends the run. */
    r->alive = r->options.broadcast ? 0 : r->alive - 1;
}

static void queue_message(struct run *r, struct connection *c, uint64_t now)
{
    unsigned depth = r->options.depth;
    c->sent_at[(c->oldest + c->in_flight) % depth] = now;
    c->in_flight++;
    c->unsent += r->options.size;
}

static bool flush_messages(struct run *r, struct connection *c)
{
    ssize_t n = channel_flush(c) ? 0 : -1;
    while (n >= 0 && c->unsent) {
        n = channel_send(c, r->messages + c->send_offset, c->whole ? r->options.size : c->unsent);
        if (n > 0) {
            c->unsent -= (size_t)n;
            c->send_offset = (c->send_offset + (size_t)n) % r->options.size;
        }
    }
    if (n < 0 && errno != EAGAIN) {
        drop(r, c, strerror(errno));
        return false;
    }
    return true;
}

/* --broadcast: the first connection speaks, and all expect it. Sent by the caller. */
static void queue_broadcast(struct run *r, uint64_t now)
{
    r->heard = 0;
    for (int i = 0; i < r->options.connections; i++) {
        r->connections[i].sent_at[0] = now;
        r->connections[i].in_flight = 1;
    }
    r->connections[0].unsent += r->options.size;
}

static void count_request(struct run *r, uint64_t latency_ns)
{
    r->all_requests++;
    if (r->phase == MEASURING || r->phase == ALIGNING_END) {
        r->requests++;
        histogram_add(&r->latency, latency_ns);
    }
}

static void complete_broadcast(struct run *r, struct connection *c, uint64_t now)
{
    c->in_flight--;
    if (r->phase >= DRAINING)
        r->idle++;
    if (++r->heard < r->alive)
        return;
    count_request(r, now - c->sent_at[0]);
    if (r->phase < DRAINING && r->alive) {
        queue_broadcast(r, now);
        flush_messages(r, &r->connections[0]);
    }
}

static void complete_message(struct run *r, struct connection *c, uint64_t now)
{
    if (r->options.broadcast) {
        complete_broadcast(r, c, now);
        return;
    }
    count_request(r, now - c->sent_at[c->oldest]);
    c->oldest = (c->oldest + 1) % r->options.depth;
    c->in_flight--;
    if (r->options.reconnect)
        return; /* on_echo goes on */
    if (r->phase < DRAINING)
        queue_message(r, c, now);
    else if (c->in_flight == 0)
        r->idle++;
}

/* Accounts for n received bytes; false when they were not what was sent. */
static bool accept_bytes(struct run *r, struct connection *c, size_t n)
{
    size_t size = r->options.size;
    uint64_t now = now_ns();
    const char *data = r->received;
    while (n) {
        size_t part = size - c->recv_offset;
        if (part > n)
            part = n;
        if (c->in_flight == 0)
            return false;
        if (r->options.verify && memcmp(data, r->messages + c->recv_offset, part) != 0)
            return false;
        data += part;
        n -= part;
        c->recv_offset += part;
        if (c->recv_offset == size) {
            c->recv_offset = 0;
            complete_message(r, c, now);
        }
    }
    return true;
}

static void open_connection(struct run *r, struct connection *c)
{
    channel_open(c, &r->options);
    /* Edge-triggered: an unfinished send needs no epoll_ctl of its own. */
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET, .data.ptr = c};
    if (epoll_ctl(r->epoll_fd, EPOLL_CTL_ADD, c->fd, &event) < 0)
        die("loadgen: epoll_ctl");
}

/* --reconnect: the echo has come, so the connection has served. */
static bool on_echo(struct run *r, struct connection *c)
{
#ifdef WITH_TLS
    if (r->options.resume && !tls_keep_session(c)) {
        drop(r, c, "its session was not resumed");
        return false;
    }
#endif
    if (!channel_shutdown(c)) {
        drop(r, c, strerror(errno));
        return false;
    }
    return true;
}

/* --reconnect: the server has closed, too. */
static void replace_connection(struct run *r, struct connection *c)
{
    channel_close(c);
    if (r->phase >= DRAINING) {
        r->idle++;
        return;
    }
    uint64_t now = now_ns();
    open_connection(r, c);
    queue_message(r, c, now);
    flush_messages(r, c);
}

static void on_event(struct run *r, struct connection *c)
{
    if (c->fd < 0 || !flush_messages(r, c))
        return;
    for (;;) {
        ssize_t n = channel_recv(c, r->received, RECV_BUFFER_BYTES);
        bool none_yet = n < 0 && errno == EAGAIN;
        if (n <= 0 && !none_yet) {
            if (c->closing)
                replace_connection(r, c);
            else
                drop(r, c, n ? strerror(errno) : "closed by the server");
            return;
        }
        if (n > 0 && !accept_bytes(r, c, (size_t)n)) {
            drop(r, c, "received bytes that were never sent");
            return;
        }
        /* A TLS handshake that is done lets the first message go, though nothing was received. */
        if (!flush_messages(r, c))
            return;
        if (r->options.reconnect && !c->in_flight && !c->closing && !on_echo(r, c))
            return;
        if (c->drained)
            return;
    }
}

/* ---- phases ----------------------------------------------------------- */

static void begin_alignment(struct run *r, enum phase phase, uint64_t now)
{
    r->phase = phase;
    r->phase_deadline_ns = now + (r->schedstat_fd < 0 ? 0 : MAX_ALIGN_NS);
    if (r->schedstat_fd >= 0)
        r->schedstat_ns = read_schedstat(r->schedstat_fd).run_ns;
}

static bool aligned(const struct run *r, uint64_t now)
{
    return now >= r->phase_deadline_ns ||
           read_schedstat(r->schedstat_fd).run_ns != r->schedstat_ns;
}

static uint64_t own_wait_ns(void)
{
    int fd = open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    uint64_t ns = read_schedstat(fd).wait_ns;
    close(fd);
    return ns;
}

static void begin_window(struct run *r)
{
    r->own_wait_start_ns = own_wait_ns();
    if (r->options.server_pid)
        r->at_start = take_sample(r->options.server_pid);
    r->started_ns = now_ns();
    r->phase = MEASURING;
    r->phase_deadline_ns = r->started_ns + (uint64_t)(r->options.seconds * 1e9);
    puts("START");
    fflush(stdout);
}

/* With --reconnect a connection is at rest only when it is closed, without them when it awaits nothing. */
static bool is_idle(const struct run *r, const struct connection *c)
{
    return !r->options.reconnect && c->fd >= 0 && c->in_flight == 0;
}

static bool all_shaken(const struct run *r)
{
    for (int i = 0; i < r->options.connections; i++)
        if (r->connections[i].fd >= 0 && !r->connections[i].shaken)
            return false;
    return true;
}

static void end_window(struct run *r)
{
    if (r->options.server_pid)
        r->at_end = take_sample(r->options.server_pid);
    r->ended_ns = now_ns();
    r->own_wait_ns = own_wait_ns() - r->own_wait_start_ns;
    puts("END");
    fflush(stdout);
    r->phase = DRAINING;
    r->phase_deadline_ns = r->ended_ns + DRAIN_NS;
    for (int i = 0; i < r->options.connections; i++)
        r->idle += is_idle(r, &r->connections[i]);
}

static void advance_phase(struct run *r)
{
    uint64_t now = now_ns();
    switch (r->phase) {
    case SHAKING:
        if (r->options.reconnect || all_shaken(r) || now >= r->phase_deadline_ns) {
            r->phase = WARMING;
            r->phase_deadline_ns = now + (uint64_t)(r->options.warmup_seconds * 1e9);
        }
        break;
    case WARMING:
        if (now >= r->phase_deadline_ns)
            begin_alignment(r, ALIGNING_START, now);
        break;
    case ALIGNING_START:
        if (aligned(r, now))
            begin_window(r);
        break;
    case MEASURING:
        if (now >= r->phase_deadline_ns)
            begin_alignment(r, ALIGNING_END, now);
        break;
    case ALIGNING_END:
        if (aligned(r, now))
            end_window(r);
        break;
    case DRAINING:
        if (r->idle >= r->alive || now >= r->phase_deadline_ns)
            r->phase = DONE;
        break;
    case DONE:
        break;
    }
    if (r->alive == 0)
        r->phase = DONE;
}

static int wait_timeout_ms(const struct run *r)
{
    if (!r->options.sleeping)
        return 0;
    uint64_t now = now_ns();
    if (now >= r->phase_deadline_ns)
        return 0;
    uint64_t ms = (r->phase_deadline_ns - now) / 1000000 + 1;
    /* While shaking hands, aligning or draining nobody else tells us that the phase is over. */
    bool watching = r->phase != WARMING && r->phase != MEASURING;
    return watching ? 1 : (int)ms;
}

static void run_phases(struct run *r)
{
    struct epoll_event events[MAX_EVENTS];
    r->phase = SHAKING;
    r->phase_deadline_ns = now_ns() + HANDSHAKES_NS;
    while (r->phase != DONE) {
        int n = epoll_wait(r->epoll_fd, events, MAX_EVENTS, wait_timeout_ms(r));
        if (n < 0 && errno != EINTR)
            die("loadgen: epoll_wait");
        for (int i = 0; i < n; i++)
            on_event(r, events[i].data.ptr);
        advance_phase(r);
    }
}

/* ---- set-up and report ------------------------------------------------ */

static void raise_fd_limit(int wanted)
{
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    if (limit.rlim_cur < (rlim_t)wanted + 16) {
        fprintf(stderr, "loadgen: %d connections need a higher limit on open files (%llu)\n", wanted,
                (unsigned long long)limit.rlim_max);
        exit(2);
    }
}

static void *allocate(size_t count, size_t size)
{
    void *p = calloc(count, size);
    if (!p)
        die("loadgen: memory");
    return p;
}

static void fill_messages(struct run *r)
{
    size_t size = r->options.size;
    r->messages = allocate(r->options.depth + 1, size);
    for (size_t i = 0; i < size; i++)
        r->messages[i] = (char)(i * 131 + i / 251);
    for (unsigned i = 1; i <= r->options.depth; i++)
        memcpy(r->messages + i * size, r->messages, size);
}

static void open_connections(struct run *r)
{
    const struct options *o = &r->options;
    r->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (r->epoll_fd < 0)
        die("loadgen: epoll_create1");
    r->connections = allocate((size_t)o->connections, sizeof *r->connections);
    for (int i = 0; i < o->connections; i++) {
        struct connection *c = &r->connections[i];
        c->sent_at = allocate(o->depth, sizeof *c->sent_at);
        open_connection(r, c);
    }
    r->alive = o->connections;
}

static void start_connections(struct run *r)
{
    if (r->options.broadcast) {
        queue_broadcast(r, now_ns());
        flush_messages(r, &r->connections[0]);
        return;
    }
    for (int i = 0; i < r->options.connections; i++) {
        struct connection *c = &r->connections[i];
        uint64_t now = now_ns();
        for (unsigned k = 0; k < r->options.depth; k++)
            queue_message(r, c, now);
        flush_messages(r, c);
    }
}

static void count_unanswered(struct run *r)
{
    for (int i = 0; i < r->options.connections; i++) {
        struct connection *c = &r->connections[i];
        if (c->fd >= 0 && (c->in_flight || c->unsent))
            drop(r, c, "echoes missing at the end");
        else if (c->closing && c->fd >= 0)
            drop(r, c, "not closed by the server");
    }
}

static void print_report(const struct run *r)
{
    const struct options *o = &r->options;
    const struct sample *a = &r->at_start, *b = &r->at_end;
    double seconds = (double)(r->ended_ns - r->started_ns) / 1e9;
    printf("{\"connections\": %d, \"size\": %zu, \"depth\": %u, \"sleeping\": %s, ", o->connections,
           o->size, o->depth, o->sleeping ? "true" : "false");
    printf("\"requests\": %llu, \"all_requests\": %llu, \"seconds\": %.6f, \"req_per_s\": %.1f, ",
           (unsigned long long)r->requests, (unsigned long long)r->all_requests, seconds,
           seconds > 0 ? (double)r->requests / seconds : 0);
    printf("\"p50_us\": %.2f, \"p99_us\": %.2f, \"max_us\": %.2f, ", percentile_us(&r->latency, 0.5),
           percentile_us(&r->latency, 0.99), (double)r->latency.max_ns / 1000);
    if (o->server_pid)
        printf("\"main_cpu_ns\": %llu, \"main_wait_ns\": %llu, \"all_cpu_ns\": %llu, "
               "\"sqpoll_cpu_ns\": %llu, \"rss_bytes\": %llu, ",
               (unsigned long long)(b->main_ns - a->main_ns), (unsigned long long)(b->wait_ns - a->wait_ns),
               (unsigned long long)(b->all_ns - a->all_ns), (unsigned long long)(b->sqpoll_ns - a->sqpoll_ns),
               (unsigned long long)b->rss_bytes);
    printf("\"client_wait_ns\": %llu, \"errors\": %llu}\n", (unsigned long long)r->own_wait_ns,
           (unsigned long long)r->errors);
}

int main(int argc, char **argv)
{
    static struct run r;
    r.options = parse_options(argc, argv);
    r.received = allocate(1, RECV_BUFFER_BYTES);
    r.schedstat_fd = -1;
    signal(SIGPIPE, SIG_IGN);
    /* Whatever goes wrong, this process ends. */
    alarm((unsigned)(r.options.warmup_seconds + r.options.seconds) + GRACE_SECONDS);
    raise_fd_limit(r.options.connections);
    fill_messages(&r);
#ifdef WITH_TLS
    prepare_tls(&r.options);
#endif
    if (r.options.server_pid) {
        char tid[16];
        snprintf(tid, sizeof tid, "%d", (int)r.options.server_pid);
        r.schedstat_fd = open_task_file(r.options.server_pid, tid, "schedstat");
    }
    open_connections(&r);
    start_connections(&r);
    run_phases(&r);
    count_unanswered(&r);
    if (!r.ended_ns)
        r.started_ns = r.ended_ns = now_ns();
    print_report(&r);
    return r.errors ? 1 : 0;
}
