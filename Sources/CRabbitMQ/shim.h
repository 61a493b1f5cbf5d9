#ifndef SMAP_CRABBITMQ_SHIM_H
#define SMAP_CRABBITMQ_SHIM_H

// librabbitmq 0.12 moved its headers into a folder; 0.11 (Debian 12, Ubuntu 22.04) has them at the top.
#if __has_include(<rabbitmq-c/amqp.h>)
#include <rabbitmq-c/amqp.h>
#include <rabbitmq-c/framing.h>
#include <rabbitmq-c/tcp_socket.h>
#else
#include <amqp.h>
#include <amqp_framing.h>
#include <amqp_tcp_socket.h>
#endif

// For the benchmark's loop over the library's own socket; the transport has one of its own.
// amqp_login_with_properties is variadic, hence invisible to Swift.
static inline amqp_rpc_reply_t smap_amqp_login_plain(
    amqp_connection_state_t connection, const char *vhost, int channel_max, int frame_max, int heartbeat,
    const amqp_table_t *properties, const char *user, const char *password) {
    return amqp_login_with_properties(
        connection, vhost, channel_max, frame_max, heartbeat, properties, AMQP_SASL_METHOD_PLAIN, user, password);
}

#endif
