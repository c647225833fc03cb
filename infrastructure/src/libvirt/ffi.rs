//! All calls into libvirt's C library that the `virt` crate does not wrap, and the guard around
//! its handles. Nothing else in Ghost is `unsafe` towards libvirt.
//!
//! Source of every contract cited: the reference at <https://libvirt.org/html/index.html>.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::{Arc, Once};

use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::Error as VirtError;
use virt::network::Network;
use virt::sys;

/// A handle of the `virt` crate whose drop cannot take the thread down: the crate panics when
/// libvirt refuses to release a handle, and a leaked handle is the lesser evil.
pub(crate) struct Guarded<T>(ManuallyDrop<T>);

impl<T> Guarded<T> {
    pub(crate) const fn new(handle: T) -> Self {
        Self(ManuallyDrop::new(handle))
    }
}

impl<T> Deref for Guarded<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> Drop for Guarded<T> {
    fn drop(&mut self) {
        let handle = &mut self.0;
        // SAFETY: this is the only place that drops the inner value, and drop runs once.
        let dropped = catch_unwind(AssertUnwindSafe(|| unsafe { ManuallyDrop::drop(handle) }));
        if dropped.is_err() {
            tracing::error!("libvirt refused to release a handle; it is leaked");
        }
    }
}

/// Prepares the library for this process: libvirt's default event loop is registered before any
/// connection is opened (it is no use later), and run for ever on a thread of its own; libvirt's
/// errors are not printed.
///
/// # Errors
/// When the event loop's thread cannot be started.
pub(crate) fn initialise() -> std::io::Result<()> {
    static ONCE: Once = Once::new();
    static RESULT: std::sync::Mutex<Option<std::io::ErrorKind>> = std::sync::Mutex::new(None);
    ONCE.call_once(|| {
        virt::error::clear_error_callback();
        if let Err(error) = virt::event::event_register_default_impl() {
            tracing::error!(%error, "libvirt's event loop cannot be registered");
        }
        let started = std::thread::Builder::new()
            .name("ghost-lv-event".into())
            .spawn(|| {
                loop {
                    // Callbacks catch their own panics; this one guards the wrapper itself.
                    let turn = catch_unwind(virt::event::event_run_default_impl);
                    if !matches!(turn, Ok(Ok(()))) {
                        tracing::error!("libvirt's event loop failed; trying again");
                        std::thread::sleep(std::time::Duration::from_millis(100));
                    }
                }
            });
        if let Err(error) = started
            && let Ok(mut result) = RESULT.lock()
        {
            *result = Some(error.kind());
        }
    });
    match RESULT.lock() {
        Ok(result) => result.map_or(Ok(()), |kind| Err(kind.into())),
        Err(_) => Err(std::io::ErrorKind::Other.into()),
    }
}

/// What libvirt tells about one domain, as raw numbers of its API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum RawEvent {
    /// `virDomainEventType` and its detail.
    Lifecycle { event: u32, detail: u32 },
    /// The guest rebooted.
    Reboot,
    /// A disk failed; `paused` when QEMU halted the guest for it.
    IoError {
        device: String,
        reason: String,
        paused: bool,
    },
    /// Somebody changed the metadata.
    MetadataChanged,
}

/// Receives what libvirt tells; called on the event loop's thread, must not block.
pub(crate) trait EventSink: Send + Sync {
    /// An event of a domain.
    fn domain_event(&self, domain: Uuid, event: RawEvent);
    /// The connection closed; `reason` is a `virConnectCloseReason`.
    fn closed(&self, reason: c_int);
}

type Sink = Arc<dyn EventSink>;

/// The callbacks of one connection. libvirt keeps a reference to the connection for each, so they
/// must be taken back with [`Callbacks::deregister`] or the connection is never freed.
#[derive(Debug)]
pub(crate) struct Callbacks {
    domain: Vec<c_int>,
    close: bool,
}

/// Registers for lifecycle, reboot, I/O error and metadata events of all domains, and for the end
/// of the connection.
///
/// # Errors
/// When the hypervisor driver knows no lifecycle events; the others are optional.
pub(crate) fn register(connection: &Connect, sink: &Sink) -> Result<Callbacks, VirtError> {
    type Lifecycle = unsafe extern "C" fn(
        sys::virConnectPtr,
        sys::virDomainPtr,
        c_int,
        c_int,
        *mut c_void,
    ) -> c_int;
    type IoError = unsafe extern "C" fn(
        sys::virConnectPtr,
        sys::virDomainPtr,
        *const c_char,
        *const c_char,
        c_int,
        *const c_char,
        *mut c_void,
    );
    type Metadata = unsafe extern "C" fn(
        sys::virConnectPtr,
        sys::virDomainPtr,
        c_int,
        *const c_char,
        *mut c_void,
    );
    type Generic = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *mut c_void);

    let mut callbacks = Callbacks {
        domain: Vec::new(),
        close: false,
    };
    // SAFETY: virConnectDomainEventRegisterAny documents that the callback's real type
    // follows from the event id and that callers cast it with VIR_DOMAIN_EVENT_CALLBACK; libvirt
    // casts it back before calling it. Function pointers all have one size. The same holds for the
    // two below.
    let lifecycle = unsafe { std::mem::transmute::<Lifecycle, Generic>(on_lifecycle) };
    // SAFETY: as above.
    let io_error = unsafe { std::mem::transmute::<IoError, Generic>(on_io_error) };
    // SAFETY: as above.
    let metadata = unsafe { std::mem::transmute::<Metadata, Generic>(on_metadata) };
    for (id, callback, needed) in [
        (sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle, true),
        (sys::VIR_DOMAIN_EVENT_ID_REBOOT, on_reboot as Generic, false),
        (sys::VIR_DOMAIN_EVENT_ID_IO_ERROR_REASON, io_error, false),
        (sys::VIR_DOMAIN_EVENT_ID_METADATA_CHANGE, metadata, false),
    ] {
        let opaque = Box::into_raw(Box::new(Arc::clone(sink)));
        // SAFETY: the connection is alive for the call; a null domain means all domains; `opaque`
        // is a leaked box that `free_sink` takes back exactly once, when libvirt drops the
        // registration. The sink is Send and Sync, as the event loop runs on another thread.
        let registered = unsafe {
            sys::virConnectDomainEventRegisterAny(
                connection.as_ptr(),
                ptr::null_mut(),
                id as c_int,
                Some(callback),
                opaque.cast(),
                Some(free_sink),
            )
        };
        if registered >= 0 {
            callbacks.domain.push(registered);
            continue;
        }
        let error = VirtError::last_error();
        // SAFETY: on failure libvirt has not taken `opaque` over and does not call the free
        // function (documented for virConnectDomainEventRegisterAny), so it is still ours.
        drop(unsafe { Box::from_raw(opaque) });
        if needed {
            callbacks.deregister(connection);
            return Err(error);
        }
    }
    let opaque = Box::into_raw(Box::new(Arc::clone(sink)));
    // SAFETY: as for the events; `free_sink` takes the box back when the callback is unregistered.
    let closed = unsafe {
        sys::virConnectRegisterCloseCallback(
            connection.as_ptr(),
            Some(on_close),
            opaque.cast(),
            Some(free_sink),
        )
    };
    if closed == 0 {
        callbacks.close = true;
    } else {
        // The test driver has no such callback.
        // SAFETY: on failure the box is still ours, as above.
        drop(unsafe { Box::from_raw(opaque) });
    }
    Ok(callbacks)
}

impl Callbacks {
    /// Takes the callbacks back. May talk to libvirtd, so it belongs on a thread that may wait.
    pub(crate) fn deregister(&mut self, connection: &Connect) {
        for id in self.domain.drain(..) {
            // SAFETY: the connection is alive and `id` was returned by it. An error (the peer is
            // gone) still removes the callback on our side.
            unsafe { sys::virConnectDomainEventDeregisterAny(connection.as_ptr(), id) };
        }
        if std::mem::take(&mut self.close) {
            // SAFETY: the connection is alive, and this very callback was registered with it.
            unsafe { sys::virConnectUnregisterCloseCallback(connection.as_ptr(), Some(on_close)) };
        }
    }
}

/// # Safety
/// `opaque` came from `Box::into_raw(Box<Sink>)` and is not used again.
unsafe extern "C" fn free_sink(opaque: *mut c_void) {
    // SAFETY: see above; libvirt calls this once for each registration.
    drop(unsafe { Box::from_raw(opaque.cast::<Sink>()) });
}

/// Hands an event on. A panic must not unwind into C.
///
/// # Safety
/// `opaque` points at a live `Sink`; `domain` is a live domain.
unsafe fn deliver(domain: sys::virDomainPtr, opaque: *mut c_void, event: RawEvent) {
    let mut uuid = [0u8; sys::VIR_UUID_BUFLEN as usize];
    // SAFETY: the domain is alive during the callback and the buffer has VIR_UUID_BUFLEN bytes.
    if unsafe { sys::virDomainGetUUID(domain, uuid.as_mut_ptr()) } != 0 {
        return;
    }
    // SAFETY: libvirt frees `opaque` only after the last callback returned.
    let sink = unsafe { &*opaque.cast::<Sink>() };
    let handled = catch_unwind(AssertUnwindSafe(|| {
        sink.domain_event(Uuid::from_bytes(uuid), event);
    }));
    if handled.is_err() {
        tracing::error!("handling a libvirt event panicked");
    }
}

/// # Safety
/// `text` is null or a C string that lives during the call.
unsafe fn text(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: see above.
    unsafe { CStr::from_ptr(text) }
        .to_string_lossy()
        .into_owned()
}

unsafe extern "C" fn on_lifecycle(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    event: c_int,
    detail: c_int,
    opaque: *mut c_void,
) -> c_int {
    let event = RawEvent::Lifecycle {
        event: u32::try_from(event).unwrap_or(u32::MAX),
        detail: u32::try_from(detail).unwrap_or(u32::MAX),
    };
    // SAFETY: libvirt calls this with the domain and the opaque value of the registration.
    unsafe { deliver(domain, opaque, event) };
    0
}

unsafe extern "C" fn on_reboot(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    opaque: *mut c_void,
) {
    // SAFETY: as in `on_lifecycle`.
    unsafe { deliver(domain, opaque, RawEvent::Reboot) };
}

unsafe extern "C" fn on_io_error(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _path: *const c_char,
    device: *const c_char,
    action: c_int,
    reason: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt passes null or C strings that live during the callback.
    let (device, reason) = unsafe { (text(device), text(reason)) };
    let event = RawEvent::IoError {
        device,
        reason,
        paused: action == sys::VIR_DOMAIN_EVENT_IO_ERROR_PAUSE as c_int,
    };
    // SAFETY: as in `on_lifecycle`.
    unsafe { deliver(domain, opaque, event) };
}

unsafe extern "C" fn on_metadata(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _kind: c_int,
    _uri: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: as in `on_lifecycle`.
    unsafe { deliver(domain, opaque, RawEvent::MetadataChanged) };
}

unsafe extern "C" fn on_close(_: sys::virConnectPtr, reason: c_int, opaque: *mut c_void) {
    // SAFETY: libvirt frees `opaque` only after the callback returned.
    let sink = unsafe { &*opaque.cast::<Sink>() };
    if catch_unwind(AssertUnwindSafe(|| sink.closed(reason))).is_err() {
        tracing::error!("handling the end of a libvirt connection panicked");
    }
}

/// A domain's `virDomainState` and its reason.
pub(crate) fn domain_state(domain: &Domain) -> Result<(u32, u32), VirtError> {
    let (mut state, mut reason): (c_int, c_int) = (0, 0);
    // SAFETY: the domain is alive; both places are valid for the call.
    let result =
        unsafe { sys::virDomainGetState(domain.as_ptr(), &raw mut state, &raw mut reason, 0) };
    if result < 0 {
        return Err(VirtError::last_error());
    }
    Ok((
        u32::try_from(state).unwrap_or(0),
        u32::try_from(reason).unwrap_or(0),
    ))
}

/// One typed value of a statistics record.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    /// Any integer; negative ones are clamped to 0.
    Unsigned(u64),
    /// Anything else.
    Other,
}

/// The statistics of one domain.
#[derive(Clone, Debug)]
pub(crate) struct StatsRecord {
    /// Its UUID.
    pub(crate) id: Uuid,
    /// Its name.
    pub(crate) name: String,
    /// Field and value, as libvirt names them.
    pub(crate) fields: Vec<(String, Value)>,
}

impl StatsRecord {
    /// An integer field.
    pub(crate) fn get(&self, name: &str) -> Option<u64> {
        self.fields.iter().find_map(|(field, value)| match value {
            Value::Unsigned(number) if field == name => Some(*number),
            _ => None,
        })
    }

    /// The sum of `PREFIX.N.SUFFIX` over all N.
    pub(crate) fn sum(&self, prefix: &str, suffix: &str) -> u64 {
        self.fields
            .iter()
            .filter_map(|(field, value)| {
                let middle = field
                    .strip_prefix(prefix)?
                    .strip_prefix('.')?
                    .strip_suffix(suffix)?
                    .strip_suffix('.')?;
                match value {
                    Value::Unsigned(number) if middle.bytes().all(|b| b.is_ascii_digit()) => {
                        Some(*number)
                    }
                    _ => None,
                }
            })
            .fold(0, u64::saturating_add)
    }
}

/// Statistics of many domains by one call; `groups` are `virDomainStatsTypes`, `flags` are
/// `virConnectGetAllDomainStatsFlags`.
pub(crate) fn all_domain_stats(
    connection: &Connect,
    groups: u32,
    flags: u32,
) -> Result<Vec<StatsRecord>, VirtError> {
    let mut list: *mut sys::virDomainStatsRecordPtr = ptr::null_mut();
    // SAFETY: the connection is alive; `list` is a valid place for the result.
    let count = unsafe {
        sys::virConnectGetAllDomainStats(connection.as_ptr(), groups, &raw mut list, flags)
    };
    let Ok(count) = usize::try_from(count) else {
        return Err(VirtError::last_error());
    };
    let mut records = Vec::with_capacity(count);
    for index in 0..count {
        // SAFETY: libvirt returned `count` records, each non-null, with `nparams` parameters and a
        // live domain, all valid until virDomainStatsRecordListFree below.
        let record = unsafe { &**list.add(index) };
        let mut uuid = [0u8; sys::VIR_UUID_BUFLEN as usize];
        // SAFETY: the record's domain is alive, the buffer has VIR_UUID_BUFLEN bytes.
        let known = unsafe { sys::virDomainGetUUID(record.dom, uuid.as_mut_ptr()) } == 0;
        // SAFETY: the name lives as long as the domain; it is copied here.
        let name = unsafe { text(sys::virDomainGetName(record.dom)) };
        let fields = (0..usize::try_from(record.nparams).unwrap_or(0))
            .map(|at| {
                // SAFETY: `params` points at `nparams` parameters.
                let parameter = unsafe { &*record.params.add(at) };
                // SAFETY: `field` is a NUL-terminated array (VIR_TYPED_PARAM_FIELD_LENGTH).
                let field = unsafe { text(parameter.field.as_ptr()) };
                (field, value(parameter))
            })
            .collect();
        if known {
            records.push(StatsRecord {
                id: Uuid::from_bytes(uuid),
                name,
                fields,
            });
        }
    }
    // SAFETY: `list` came from virConnectGetAllDomainStats and is freed once; all was copied.
    unsafe { sys::virDomainStatsRecordListFree(list) };
    Ok(records)
}

fn value(parameter: &sys::virTypedParameter) -> Value {
    let union = &parameter.value;
    // SAFETY: `type_` says which member of the union libvirt has set.
    let number: i128 = unsafe {
        match u32::try_from(parameter.type_).unwrap_or(0) {
            sys::VIR_TYPED_PARAM_INT => union.i.into(),
            sys::VIR_TYPED_PARAM_UINT => union.ui.into(),
            sys::VIR_TYPED_PARAM_LLONG => union.l.into(),
            sys::VIR_TYPED_PARAM_ULLONG => union.ul.into(),
            _ => return Value::Other,
        }
    };
    Value::Unsigned(u64::try_from(number.max(0)).unwrap_or(u64::MAX))
}

/// A lease as dnsmasq gave it.
#[derive(Clone, Debug)]
pub(crate) struct RawLease {
    pub(crate) mac: String,
    pub(crate) address: String,
    pub(crate) hostname: Option<String>,
    /// Seconds since the epoch; 0 for never.
    pub(crate) expires: i64,
}

/// The DHCP leases of a network.
pub(crate) fn dhcp_leases(network: &Network) -> Result<Vec<RawLease>, VirtError> {
    let mut list: *mut sys::virNetworkDHCPLeasePtr = ptr::null_mut();
    // SAFETY: the network is alive; a null MAC means all; `list` is a valid place for the result.
    let count =
        unsafe { sys::virNetworkGetDHCPLeases(network.as_ptr(), ptr::null(), &raw mut list, 0) };
    let Ok(count) = usize::try_from(count) else {
        return Err(VirtError::last_error());
    };
    let mut leases = Vec::with_capacity(count);
    for index in 0..count {
        // SAFETY: libvirt returned `count` non-null leases; each is copied and then freed once.
        let lease = unsafe { *list.add(index) };
        // SAFETY: the strings of a lease are null or C strings that live until it is freed.
        let raw = unsafe {
            let lease = &*lease;
            RawLease {
                mac: text(lease.mac),
                address: text(lease.ipaddr),
                hostname: Some(text(lease.hostname)).filter(|name| !name.is_empty()),
                expires: lease.expirytime,
            }
        };
        leases.push(raw);
        // SAFETY: as above.
        unsafe { sys::virNetworkDHCPLeaseFree(lease) };
    }
    // SAFETY: the caller frees the array itself with free(), as virNetworkGetDHCPLeases documents;
    // free() of null is nothing.
    unsafe { libc::free(list.cast()) };
    Ok(leases)
}
