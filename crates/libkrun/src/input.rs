//! Input devices: evdev descriptors, and the caller's own through callbacks (`include/libkrun_input.h`).

use std::ffi::{c_int, c_void};
use std::io;
use std::mem::size_of;
use std::os::fd::{BorrowedFd, RawFd};
use std::ptr;

use krun_api::{AxisInfo, DeviceIds, Input, InputConfig, InputEvent, InputSource};

use crate::context::with;
use crate::start::duplicate;
use crate::{Answer, EINVAL, Errno, console};

/// Feature bit of both objects: the callbacks of their tables are there.
const FEATURE: u64 = 1;

type Create = Option<unsafe extern "C" fn(*mut *mut c_void, *const c_void, *const c_void) -> i32>;
type Destroy = Option<unsafe extern "C" fn(*mut c_void) -> i32>;
type QueryBytes = Option<unsafe extern "C" fn(*mut c_void, *mut u8, usize) -> i32>;

#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Event {
    kind: u16,
    code: u16,
    value: u32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Ids {
    bus: u16,
    vendor: u16,
    product: u16,
    version: u16,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Axis {
    min: u32,
    max: u32,
    fuzz: u32,
    flat: u32,
    resolution: u32,
}

/// `struct krun_input_config`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ConfigObject {
    features: u64,
    userdata: *mut c_void,
    create: Create,
    destroy: Destroy,
    name: QueryBytes,
    serial: QueryBytes,
    ids: Option<unsafe extern "C" fn(*mut c_void, *mut Ids) -> i32>,
    codes: Option<unsafe extern "C" fn(*mut c_void, u8, *mut u8, usize) -> i32>,
    axis: Option<unsafe extern "C" fn(*mut c_void, u8, *mut Axis) -> i32>,
    properties: QueryBytes,
}

/// `struct krun_input_event_provider`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct EventsObject {
    features: u64,
    userdata: *mut c_void,
    create: Create,
    destroy: Destroy,
    ready: Option<unsafe extern "C" fn(*mut c_void) -> c_int>,
    next: Option<unsafe extern "C" fn(*mut c_void, *mut Event) -> i32>,
}

/// An input device as the caller described it.
#[derive(Debug)]
pub enum Described {
    Evdev(RawFd),
    Callbacks(ConfigObject, EventsObject),
}

// SAFETY: the pointers are the caller's. The header says that its callbacks are called from one thread at a
// time, which may be another than the one that gave them.
unsafe impl Send for Described {}

/// An object of the caller that was created.
struct Instance {
    object: *mut c_void,
    destroy: Destroy,
}

impl Instance {
    fn new(create: Create, destroy: Destroy, userdata: *mut c_void) -> io::Result<Self> {
        let mut object = ptr::null_mut();
        match create {
            // SAFETY: as the header has it: a place for the instance, the caller's data, nothing.
            Some(create) => check("create", unsafe { create(&raw mut object, userdata, ptr::null()) })?,
            None => {
                object = userdata;
                0
            }
        };
        Ok(Self { object, destroy })
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        if let Some(destroy) = self.destroy {
            // SAFETY: the instance is the caller's and nobody uses it any more.
            unsafe { destroy(self.object) };
        }
    }
}

fn check(what: &str, result: i32) -> io::Result<i32> {
    if result >= 0 {
        return Ok(result);
    }
    Err(io::Error::other(format!("the callback {what} answered {result}")))
}

/// Bytes of a callback that stores up to so many and answers how many.
fn bytes(call: impl FnOnce(*mut u8, usize) -> i32) -> Vec<u8> {
    let mut buffer = vec![0u8; 128];
    let len = usize::try_from(call(buffer.as_mut_ptr(), buffer.len())).unwrap_or(0);
    buffer.truncate(len);
    buffer
}

/// Asks the caller's object for everything.
fn describe(config: &ConfigObject) -> io::Result<InputConfig> {
    let instance = Instance::new(config.create, config.destroy, config.userdata)?;
    let object = instance.object;
    let ask = |query: QueryBytes| {
        // SAFETY: the callback stores at most as many bytes as it is told there is room for.
        query.map(|query| bytes(|at, len| unsafe { query(object, at, len) })).unwrap_or_default()
    };
    let text = |mut bytes: Vec<u8>| {
        bytes.truncate(bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len()));
        bytes
    };
    let mut described = InputConfig {
        name: text(ask(config.name)),
        serial: text(ask(config.serial)),
        properties: ask(config.properties),
        ..InputConfig::default()
    };
    let mut ids = Ids::default();
    // SAFETY: the callback fills the structure in.
    if config.ids.is_some_and(|query| unsafe { query(object, &raw mut ids) } >= 0) {
        let Ids { bus, vendor, product, version } = ids;
        described.ids = DeviceIds { bus, vendor, product, version };
    }
    // EV_KEY to EV_SND with codes, and EV_REP.
    for kind in [1, 2, 3, 4, 5, 0x11, 0x12, 0x14] {
        // SAFETY: as in `ask`.
        let codes = config.codes.map(|query| bytes(|at, len| unsafe { query(object, kind, at, len) }));
        described.events.extend(codes.filter(|codes| !codes.is_empty()).map(|codes| (kind, codes)));
    }
    let axes = described.events.get(&3).cloned().unwrap_or_default();
    for code in (0..64u8).filter(|n| axes.get(usize::from(n / 8)).is_some_and(|b| b & 1 << (n % 8) != 0)) {
        let mut axis = Axis::default();
        // SAFETY: the callback fills the structure in.
        if config.axis.is_some_and(|query| unsafe { query(object, code, &raw mut axis) } >= 0) {
            let Axis { min, max, fuzz, flat, resolution } = axis;
            described.axes.insert(code, AxisInfo { min, max, fuzz, flat, resolution });
        }
    }
    Ok(described)
}

/// The caller's events. The instance lives between `start` and `stop`, on the device's thread.
struct Events {
    object: EventsObject,
    instance: Option<Instance>,
    fd: RawFd,
}

// SAFETY: as for `Described`; the instance does not leave the device's thread.
unsafe impl Send for Events {}

impl Events {
    fn fetch(&self) -> io::Result<Option<InputEvent>> {
        let (Some(instance), Some(next)) = (&self.instance, self.object.next) else { return Ok(None) };
        let mut event = Event::default();
        // SAFETY: the callback stores an event when it answers 1.
        match check("next_event", unsafe { next(instance.object, &raw mut event) })? {
            0 => Ok(None),
            _ => Ok(Some(InputEvent { kind: event.kind, code: event.code, value: event.value })),
        }
    }

    /// Clears an eventfd that the caller did not clear; says whether there was something to clear.
    fn clear(&self) -> bool {
        let mut ready = libc::pollfd { fd: self.fd, events: libc::POLLIN, revents: 0 };
        // SAFETY: one descriptor, without waiting.
        let readable = unsafe { libc::poll(&raw mut ready, 1, 0) } == 1 && ready.revents & libc::POLLIN != 0;
        let is_eventfd = || {
            let link = std::fs::read_link(format!("/proc/self/fd/{}", self.fd));
            link.is_ok_and(|link| link.as_os_str() == "anon_inode:[eventfd]")
        };
        let mut count = [0u8; 8];
        // SAFETY: reads into 8 bytes of ours; it does not block, as the descriptor is readable.
        readable && is_eventfd() && unsafe { libc::read(self.fd, count.as_mut_ptr().cast(), 8) } == 8
    }
}

impl InputSource for Events {
    fn start(&mut self) -> io::Result<()> {
        let instance = Instance::new(self.object.create, self.object.destroy, self.object.userdata)?;
        let ready = self.object.ready.ok_or(io::ErrorKind::Unsupported)?;
        // SAFETY: the instance was just created.
        self.fd = check("get_ready_efd", unsafe { ready(instance.object) })?;
        self.instance = Some(instance);
        Ok(())
    }

    fn ready(&self) -> io::Result<BorrowedFd<'_>> {
        if self.instance.is_none() || self.fd < 0 {
            return Err(io::ErrorKind::NotConnected.into());
        }
        // SAFETY: the header asks for a descriptor that stays open while the instance lives.
        Ok(unsafe { BorrowedFd::borrow_raw(self.fd) })
    }

    fn next(&mut self) -> io::Result<Option<InputEvent>> {
        match self.fetch()? {
            // An event may have come just before the clearing.
            None if self.clear() => self.fetch(),
            event => Ok(event),
        }
    }

    fn stop(&mut self) {
        self.instance = None;
        self.fd = -1;
    }
}

/// The device that was described.
pub fn device(described: Described) -> Answer<Input> {
    match described {
        Described::Evdev(fd) => Input::evdev(duplicate(fd)?.ok_or(EINVAL)?).map_err(|e| {
            tracing::error!("{e}");
            Errno(e.raw_os_error().unwrap_or(libc::EINVAL))
        }),
        Described::Callbacks(config, events) => {
            let config = describe(&config).map_err(|e| {
                tracing::error!("input device: {e}");
                EINVAL
            })?;
            Ok(Input::new(config, Events { object: events, instance: None, fd: -1 }))
        }
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn krun_add_input_device(
    ctx_id: u32,
    config_backend: *const c_void,
    config_backend_size: usize,
    events_backend: *const c_void,
    events_backend_size: usize,
) -> c_int {
    with(ctx_id, |context| {
        let sizes = (size_of::<ConfigObject>(), size_of::<EventsObject>());
        if config_backend.is_null()
            || events_backend.is_null()
            || config_backend_size < sizes.0
            || events_backend_size < sizes.1
        {
            return Err(EINVAL);
        }
        // SAFETY: neither is NULL, both are as long as the structures, and the header asks for those. All bit
        // patterns are values of theirs: a function pointer may be NULL, and others are the caller's word.
        let (config, events) = unsafe {
            (
                config_backend.cast::<ConfigObject>().read_unaligned(),
                events_backend.cast::<EventsObject>().read_unaligned(),
            )
        };
        let complete = events.ready.is_some() && events.next.is_some();
        if config.features & events.features & FEATURE == 0 || !complete {
            return Err(EINVAL);
        }
        context.inputs.push(Described::Callbacks(config, events));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn krun_add_input_device_fd(ctx_id: u32, input_fd: c_int) -> c_int {
    with(ctx_id, |context| {
        context.inputs.push(Described::Evdev(console::descriptor(input_fd)?));
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    /// The caller's side: an eventfd that it does not clear, and events.
    struct Mine {
        fd: c_int,
        events: Mutex<Vec<Event>>,
    }

    unsafe extern "C" fn create(into: *mut *mut c_void, userdata: *const c_void, _: *const c_void) -> i32 {
        // SAFETY: as called by this module.
        unsafe { *into = userdata.cast_mut() };
        0
    }
    unsafe extern "C" fn name(_: *mut c_void, at: *mut u8, len: usize) -> i32 {
        let text = b"mine\0\0";
        // SAFETY: as called by this module, there are `len` bytes.
        unsafe { at.copy_from(text.as_ptr(), text.len().min(len)) };
        // More than there is room for.
        1000
    }
    unsafe extern "C" fn ids(_: *mut c_void, into: *mut Ids) -> i32 {
        // SAFETY: as called by this module.
        unsafe { *into = Ids { bus: 1, vendor: 2, product: 3, version: 4 } };
        0
    }
    unsafe extern "C" fn codes(_: *mut c_void, kind: u8, at: *mut u8, _: usize) -> i32 {
        // SAFETY: as called by this module.
        unsafe { at.write(0b10) };
        if kind == 3 { 1 } else { -3 }
    }
    unsafe extern "C" fn axis(_: *mut c_void, code: u8, into: *mut Axis) -> i32 {
        // SAFETY: as called by this module.
        unsafe { (*into).max = code.into() };
        0
    }
    unsafe extern "C" fn ready(mine: *mut c_void) -> c_int {
        // SAFETY: the userdata of these tests.
        unsafe { (*mine.cast::<Mine>()).fd }
    }
    unsafe extern "C" fn next(mine: *mut c_void, into: *mut Event) -> i32 {
        // SAFETY: the userdata of these tests, and a place for an event.
        unsafe {
            match (*mine.cast::<Mine>()).events.lock().unwrap().pop() {
                Some(event) => {
                    into.write(event);
                    1
                }
                None => 0,
            }
        }
    }

    fn config() -> ConfigObject {
        ConfigObject {
            features: 1,
            userdata: ptr::null_mut(),
            create: Some(create),
            destroy: None,
            name: Some(name),
            serial: None,
            ids: Some(ids),
            codes: Some(codes),
            axis: Some(axis),
            properties: None,
        }
    }

    fn events(mine: &Mine) -> EventsObject {
        EventsObject {
            features: 1,
            userdata: ptr::from_ref(mine).cast_mut().cast(),
            create: Some(create),
            destroy: None,
            ready: Some(ready),
            next: Some(next),
        }
    }

    #[test]
    fn structures_are_laid_out_as_in_the_header() {
        assert_eq!((size_of::<ConfigObject>(), size_of::<EventsObject>()), (80, 48));
        assert_eq!((size_of::<Event>(), size_of::<Ids>(), size_of::<Axis>()), (8, 8, 20));
    }

    #[test]
    fn callbacks_describe_a_device() {
        let described = describe(&config()).unwrap();
        assert_eq!(described.name, b"mine");
        assert_eq!(described.ids, DeviceIds { bus: 1, vendor: 2, product: 3, version: 4 });
        assert_eq!(described.events.into_iter().collect::<Vec<_>>(), [(3, vec![2])]);
        assert_eq!(described.axes[&1].max, 1);
        let none = ConfigObject { name: None, ids: None, codes: None, axis: None, create: None, ..config() };
        assert_eq!(describe(&none).unwrap(), InputConfig::default());
    }

    #[test]
    fn an_eventfd_that_the_caller_leaves_set_is_cleared() {
        // SAFETY: no memory is passed.
        let fd = unsafe { libc::eventfd(3, libc::EFD_CLOEXEC) };
        let mine = Mine { fd, events: Mutex::new(vec![Event { kind: 1, code: 2, value: 3 }]) };
        let mut source = Events { object: events(&mine), instance: None, fd: -1 };
        assert!(source.ready().is_err());
        source.start().unwrap();
        assert_eq!(source.next().unwrap(), Some(InputEvent { kind: 1, code: 2, value: 3 }));
        assert_eq!(source.next().unwrap(), None);
        assert!(!source.clear(), "it is not readable any more");
        source.stop();
        assert!(source.ready().is_err());
        // SAFETY: opened above, used by nobody else.
        unsafe { libc::close(fd) };
    }

    #[test]
    fn what_is_too_short_or_incomplete_is_refused() {
        let mine = Mine { fd: -1, events: Mutex::default() };
        let (config, events) = (config(), events(&mine));
        let ctx = crate::context::create().unwrap() as u32;
        let add = |c: &ConfigObject, c_len, e: &EventsObject, e_len| {
            let (c, e) = (ptr::from_ref(c).cast(), ptr::from_ref(e).cast());
            // SAFETY: whole structures, whatever length is told.
            unsafe { krun_add_input_device(ctx, c, c_len, e, e_len) }
        };
        assert_eq!(add(&config, 80, &events, 48), 0);
        assert_eq!(add(&config, 79, &events, 48), -libc::EINVAL);
        assert_eq!(add(&config, 80, &events, 47), -libc::EINVAL);
        assert_eq!(add(&config, 80, &EventsObject { next: None, ..events }, 48), -libc::EINVAL);
        assert_eq!(add(&ConfigObject { features: 2, ..config }, 80, &events, 48), -libc::EINVAL);
        assert_eq!(krun_add_input_device_fd(ctx, -1), -libc::EINVAL);
        assert_eq!(krun_add_input_device_fd(ctx + 1000, 0), -libc::ENOENT);
        crate::context::remove(ctx).unwrap();
    }
}
