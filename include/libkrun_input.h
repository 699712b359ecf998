/* SPDX-License-Identifier: Apache-2.0
 *
 * libkrun: input devices whose events come from the program; see krun_add_input_device().
 *
 * Callbacks answer 0 or more, or a negative KRUN_INPUT_ERR_*. Those of the configuration are called once,
 * while krun_start_enter() runs; those of the events from a thread of the VM, one at a time, each time that the
 * guest's driver starts: create, get_ready_efd, any number of next_event, destroy.
 */
#ifndef LIBKRUN_INPUT_H
#define LIBKRUN_INPUT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KRUN_INPUT_ERR_INTERNAL (-1)
#define KRUN_INPUT_ERR_EAGAIN (-2)
#define KRUN_INPUT_ERR_METHOD_UNSUPPORTED (-3)
#define KRUN_INPUT_ERR_INVALID_PARAM (-4)

/* Each object sets its bit in `features`. */
#define KRUN_INPUT_CONFIG_FEATURE_QUERY 1
#define KRUN_INPUT_EVENT_PROVIDER_FEATURE_QUEUE 1

/* As in linux/input.h, without the time. */
struct krun_input_event {
    uint16_t type;
    uint16_t code;
    uint32_t value;
};

struct krun_input_device_ids {
    uint16_t bustype;
    uint16_t vendor;
    uint16_t product;
    uint16_t version;
};

struct krun_input_absinfo {
    uint32_t min;
    uint32_t max;
    uint32_t fuzz;
    uint32_t flat;
    uint32_t res;
};

/* Stores what the other callbacks get as `instance`. Without this callback they get the userdata. */
typedef int32_t (*krun_input_create_fn)(void **instance, const void *userdata, const void *reserved);
typedef int32_t (*krun_input_destroy_fn)(void *instance);

/* A descriptor that is readable while there are events and stays open until destroy. */
typedef int (*krun_input_get_ready_efd_fn)(void *instance);
/* 1 and an event, or 0 when there is none. Does not block. */
typedef int32_t (*krun_input_next_event_fn)(void *instance, struct krun_input_event *out_event);

/* Names and bitmaps, the lowest bit of the first byte first, of up to `len` bytes: the number stored. */
typedef int32_t (*krun_input_query_device_name_fn)(void *instance, uint8_t *name_buf, size_t len);
typedef int32_t (*krun_input_query_serial_name_fn)(void *instance, uint8_t *name_buf, size_t len);
typedef int32_t (*krun_input_query_device_ids_fn)(void *instance, struct krun_input_device_ids *ids);
typedef int32_t (*krun_input_query_event_capabilities_fn)(void *instance, uint8_t event_type, uint8_t *bitmap,
                                                          size_t len);
typedef int32_t (*krun_input_query_abs_info_fn)(void *instance, uint8_t abs_axis,
                                                struct krun_input_absinfo *abs_info);
typedef int32_t (*krun_input_query_properties_fn)(void *instance, uint8_t *bitmap, size_t len);

/* Any of these may be NULL. */
struct krun_input_config_vtable {
    krun_input_destroy_fn destroy;
    krun_input_query_device_name_fn query_device_name;
    krun_input_query_serial_name_fn query_serial_name;
    krun_input_query_device_ids_fn query_device_ids;
    krun_input_query_event_capabilities_fn query_event_capabilities;
    krun_input_query_abs_info_fn query_abs_info;
    krun_input_query_properties_fn query_properties;
};

/* Of these only destroy may be NULL. */
struct krun_input_event_provider_vtable {
    krun_input_destroy_fn destroy;
    krun_input_get_ready_efd_fn get_ready_efd;
    krun_input_next_event_fn next_event;
};

struct krun_input_config {
    uint64_t features;
    void *create_userdata;
    krun_input_create_fn create;
    struct krun_input_config_vtable vtable;
};

struct krun_input_event_provider {
    uint64_t features;
    void *create_userdata;
    krun_input_create_fn create;
    struct krun_input_event_provider_vtable vtable;
};

#ifdef __cplusplus
}
#endif

#endif /* LIBKRUN_INPUT_H */
