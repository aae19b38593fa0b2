/*
 * The floor: the plainest good epoll echo server.
 *
 * One thread, level-triggered epoll. One hot receive buffer serves every
 * connection; what was received is sent at once. Only when the kernel takes
 * less than that is the rest copied aside, and the connection is not read
 * again before it has gone (EPOLLOUT), so memory stays bounded.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define BUFFER_BYTES (256u << 10)
#define MAX_EVENTS 1024
#define BACKLOG 4096

struct connection {
    int fd;
    char *rest;        /* what a short send left over, NULL when nothing is pending */
    size_t rest_start;
    size_t rest_end;
};

static int epoll_fd;
static char buffer[BUFFER_BYTES];

static void die(const char *what)
{
    perror(what);
    exit(2);
}

static void watch(int op, struct connection *c, unsigned mask)
{
    struct epoll_event event = {.events = mask, .data.ptr = c};
    if (epoll_ctl(epoll_fd, op, c->fd, &event) < 0)
        die("echo_server: epoll_ctl");
}

static void drop(struct connection *c)
{
    close(c->fd);
    free(c->rest);
    free(c);
}

static void keep_rest(struct connection *c, const char *data, size_t len)
{
    c->rest = malloc(len);
    if (!c->rest)
        die("echo_server: malloc");
    memcpy(c->rest, data, len);
    c->rest_start = 0;
    c->rest_end = len;
    watch(EPOLL_CTL_MOD, c, EPOLLOUT);
}

static void on_readable(struct connection *c)
{
    ssize_t got = recv(c->fd, buffer, BUFFER_BYTES, 0);
    if (got < 0 && errno == EAGAIN)
        return;
    if (got <= 0) {
        drop(c);
        return;
    }
    ssize_t sent = send(c->fd, buffer, (size_t)got, MSG_NOSIGNAL);
    if (sent < 0 && errno != EAGAIN) {
        drop(c);
        return;
    }
    if (sent < 0)
        sent = 0;
    if (sent < got)
        keep_rest(c, buffer + sent, (size_t)(got - sent));
}

static void on_writable(struct connection *c)
{
    ssize_t sent = send(c->fd, c->rest + c->rest_start, c->rest_end - c->rest_start, MSG_NOSIGNAL);
    if (sent < 0) {
        if (errno != EAGAIN)
            drop(c);
        return;
    }
    c->rest_start += (size_t)sent;
    if (c->rest_start < c->rest_end)
        return;
    free(c->rest);
    c->rest = NULL;
    watch(EPOLL_CTL_MOD, c, EPOLLIN);
}

static void on_accept(int listener, int is_tcp)
{
    int fd, one = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        if (is_tcp)
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        struct connection *c = calloc(1, sizeof *c);
        if (!c)
            die("echo_server: calloc");
        c->fd = fd;
        watch(EPOLL_CTL_ADD, c, EPOLLIN);
    }
}

static int listen_tcp(int port)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((unsigned short)port),
                            .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof a;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&a, sizeof a) < 0 || listen(fd, BACKLOG) < 0)
        die("echo_server: listen");
    if (getsockname(fd, (struct sockaddr *)&a, &len) < 0)
        die("echo_server: getsockname");
    printf("{\"port\": %d}\n", ntohs(a.sin_port));
    return fd;
}

static int listen_unix(const char *unix_path)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    if (strlen(unix_path) >= sizeof a.sun_path) {
        fprintf(stderr, "echo_server: --unix path is too long\n");
        exit(2);
    }
    strcpy(a.sun_path, unix_path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&a, sizeof a) < 0 || listen(fd, BACKLOG) < 0)
        die("echo_server: listen");
    printf("{\"port\": 0}\n");
    return fd;
}

static void serve(int listener, int is_tcp)
{
    struct epoll_event events[MAX_EVENTS];
    /* The listener is the one entry without a connection. */
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &event) < 0)
        die("echo_server: epoll_ctl");
    for (;;) {
        int n = epoll_wait(epoll_fd, events, MAX_EVENTS, -1);
        if (n < 0 && errno != EINTR)
            die("echo_server: epoll_wait");
        for (int i = 0; i < n; i++) {
            struct connection *c = events[i].data.ptr;
            if (!c)
                on_accept(listener, is_tcp);
            else if (c->rest)
                on_writable(c);
            else
                on_readable(c);
        }
    }
}

int main(int argc, char **argv)
{
    static const struct option longs[] = {
        {"port", 1, 0, 'p'}, {"unix", 1, 0, 'u'}, {"seconds", 1, 0, 't'}, {0, 0, 0, 0}};
    const char *unix_path = NULL;
    int port = 0, c;
    unsigned seconds = 600;
    while ((c = getopt_long(argc, argv, "", longs, NULL)) != -1) {
        switch (c) {
        case 'p': port = atoi(optarg); break;
        case 'u': unix_path = optarg; break;
        case 't': seconds = (unsigned)atoi(optarg); break;
        default:
            fprintf(stderr, "usage: echo_server [--port PORT | --unix PATH] [--seconds SECONDS]\n");
            return 2;
        }
    }
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    alarm(seconds); /* never outlives a harness that died */
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (epoll_fd < 0)
        die("echo_server: epoll_create1");
    int listener = unix_path ? listen_unix(unix_path) : listen_tcp(port);
    fflush(stdout);
    serve(listener, !unix_path);
    return 0;
}
