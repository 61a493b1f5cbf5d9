#ifndef SMAP_CRABBITMQ_SHIM_H
#define SMAP_CRABBITMQ_SHIM_H

// librabbitmq 0.12 moved its headers into a folder; 0.11 (Debian 12, Ubuntu 22.04) has them at the top.
#if __has_include(<rabbitmq-c/amqp.h>)
#include <rabbitmq-c/amqp.h>
#include <rabbitmq-c/framing.h>
#include <rabbitmq-c/ssl_socket.h>
#include <rabbitmq-c/tcp_socket.h>
#else
#include <amqp.h>
#include <amqp_framing.h>
#include <amqp_ssl_socket.h>
#include <amqp_tcp_socket.h>
#endif
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <stdint.h>

// amqp_login_with_properties is variadic, hence invisible to Swift.
static inline amqp_rpc_reply_t smap_amqp_login_plain(
    amqp_connection_state_t connection, const char *vhost, int channel_max, int frame_max, int heartbeat,
    const amqp_table_t *properties, const char *user, const char *password) {
    return amqp_login_with_properties(
        connection, vhost, channel_max, frame_max, heartbeat, properties, AMQP_SASL_METHOD_PLAIN, user, password);
}

// Leaves with the context why OpenSSL refused the server's certificate.
static int smap_tls_verify(int is_fine, X509_STORE_CTX *store) {
    SSL *ssl = (SSL *)X509_STORE_CTX_get_ex_data(store, SSL_get_ex_data_X509_STORE_CTX_idx());
    if (!is_fine && ssl)
        SSL_CTX_set_app_data(SSL_get_SSL_CTX(ssl), (char *)(intptr_t)X509_STORE_CTX_get_error(store));
    return is_fine;
}

// librabbitmq verifies only after the handshake, knows no default authorities, takes TLS 1.1, and compares names with DNS
// entries only. So the context is told: the handshake itself then fails. Most of these are macros, hence the wrapper.
// 0 if something could not be set.
static inline int smap_tls_prepare(void *context, const char *host, int is_address, int verify_peer, int verify_host,
                                   int use_system_authorities) {
    SSL_CTX *ssl = (SSL_CTX *)context;
    ERR_clear_error();
    if (!SSL_CTX_set_min_proto_version(ssl, TLS1_2_VERSION)) return 0;
    if (use_system_authorities && !SSL_CTX_set_default_verify_paths(ssl)) return 0;
    SSL_CTX_set_verify(ssl, verify_peer ? SSL_VERIFY_PEER : SSL_VERIFY_NONE, smap_tls_verify);
    if (verify_peer && verify_host) {
        X509_VERIFY_PARAM *rules = SSL_CTX_get0_param(ssl);
        if (is_address ? !X509_VERIFY_PARAM_set1_ip_asc(rules, host) : !X509_VERIFY_PARAM_set1_host(rules, host, 0))
            return 0;
    }
    return 1;
}

// What OpenSSL has against the server's certificate; NULL if nothing.
static inline const char *smap_tls_refusal_text(void *context) {
    intptr_t error = (intptr_t)SSL_CTX_get_app_data((SSL_CTX *)context);
    return error == X509_V_OK ? NULL : X509_verify_cert_error_string((long)error);
}

// What OpenSSL has against the handshake; NULL if nothing, or if the server just hung up.
static inline const char *smap_tls_failure_text(void) {
    unsigned long error = ERR_peek_last_error();
    if (error == 0 || ERR_GET_LIB(error) != ERR_LIB_SSL) return NULL;
#ifdef SSL_R_UNEXPECTED_EOF_WHILE_READING
    if (ERR_GET_REASON(error) == SSL_R_UNEXPECTED_EOF_WHILE_READING) return NULL;
#endif
    return ERR_reason_error_string(error);
}

#endif
