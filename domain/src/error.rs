//! One error for the whole of Ghost, free of any transport. What the person sees (message, cause,
//! hint) is separate from what the log sees; the stable [`ErrorCode`] is what programs match on.

use std::fmt;
use std::time::Duration;

use crate::OperationId;

/// The result of anything that may fail in Ghost.
pub type Result<T, E = Error> = std::result::Result<T, E>;

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $text:literal,)*) => {
        /// Stable codes. A code, once released, keeps its text and its meaning; new ones are added.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum ErrorCode { $($(#[$doc])* $variant,)* }

        impl ErrorCode {
            /// Every code, for tables and tests.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The code as programs see it, in snake case.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }

            /// Reads a code back; `None` for one this version does not know.
            pub fn parse(text: &str) -> Option<Self> {
                match text { $($text => Some(Self::$variant),)* _ => None }
            }
        }
    };
}

codes! {
    /// A field has an illegal value.
    InvalidArgument = "invalid_argument",
    /// A name breaks its rule.
    InvalidName = "invalid_name",
    /// A size is not a size, or absurd.
    InvalidSize = "invalid_size",
    /// User-data or network config is neither a script nor valid YAML.
    InvalidUserData = "invalid_user_data",
    /// The requested disk is smaller than the image's virtual size.
    DiskTooSmall = "disk_too_small",
    /// A body or upload exceeds its limit.
    PayloadTooLarge = "payload_too_large",
    /// Two requests used one request id for different things.
    RequestIdReused = "request_id_reused",
    /// No such VM.
    VmNotFound = "vm_not_found",
    /// A prefix or name matches more than one VM.
    VmAmbiguous = "vm_ambiguous",
    /// Neither the cache nor the catalogue has the image.
    ImageNotFound = "image_not_found",
    /// No such operation.
    OperationNotFound = "operation_not_found",
    /// No such network.
    NetworkNotFound = "network_not_found",
    /// No such key, certificate or token.
    CredentialNotFound = "credential_not_found",
    /// A route that does not exist (HTTP).
    NotFound = "not_found",
    /// Another VM has the name.
    NameTaken = "name_taken",
    /// The image name is taken by another image.
    ImageExists = "image_exists",
    /// A VM is built on the image.
    ImageInUse = "image_in_use",
    /// Another operation holds the VM; it is named in the message.
    VmBusy = "vm_busy",
    /// The VM is running and the request needs it not to be.
    VmRunning = "vm_running",
    /// The VM is not running and the request needs it to be.
    VmNotRunning = "vm_not_running",
    /// The VM's state does not allow the request.
    WrongState = "wrong_state",
    /// The VM is protected against deletion.
    DeleteProtected = "delete_protected",
    /// `If-Match` or an expected generation does not match.
    GenerationMismatch = "generation_mismatch",
    /// The operation has already ended or can no longer be cancelled.
    OperationFinished = "operation_finished",
    /// CPU, memory or disk left to VMs does not suffice.
    InsufficientResources = "insufficient_resources",
    /// The file system is full.
    DiskFull = "disk_full",
    /// Too many requests or operations at once.
    TooManyRequests = "too_many_requests",
    /// The image's bytes do not have the expected checksum.
    ChecksumMismatch = "checksum_mismatch",
    /// A download failed or ended early.
    DownloadFailed = "download_failed",
    /// The image could reach outside itself (backing file, external data file) or hides its kind.
    UnsafeImage = "unsafe_image",
    /// The image's format or features are not supported.
    UnsupportedImage = "unsupported_image",
    /// The image expands beyond its limit.
    ImageTooLarge = "image_too_large",
    /// libvirt cannot be reached or does not answer.
    HypervisorUnavailable = "hypervisor_unavailable",
    /// libvirt or QEMU refused or failed.
    HypervisorFailed = "hypervisor_failed",
    /// The agent in the guest cannot be reached: no channel, no hello, or it went away.
    GuestUnreachable = "guest_unreachable",
    /// The guest's agent cannot or may not do this.
    GuestUnsupported = "guest_unsupported",
    /// The guest refused or failed.
    GuestFailed = "guest_failed",
    /// The guest has no such file.
    GuestFileNotFound = "guest_file_not_found",
    /// The path leads out of what the guest's owner opened.
    GuestPathDenied = "guest_path_denied",
    /// The guest's file systems are frozen.
    GuestFrozen = "guest_frozen",
    /// Guest access of this VM is off.
    GuestAccessOff = "guest_access_off",
    /// The owner closed all ways into guests.
    Lockdown = "lockdown",
    /// The network could not be made or started.
    NetworkFailed = "network_failed",
    /// The state store cannot take writes.
    StoreUnavailable = "store_unavailable",
    /// State is being rebuilt; destructive requests wait.
    Recovering = "recovering",
    /// The agent is shutting down.
    ShuttingDown = "shutting_down",
    /// The agent could not be reached (client side).
    AgentUnreachable = "agent_unreachable",
    /// A deadline passed.
    DeadlineExceeded = "deadline_exceeded",
    /// The operation was cancelled.
    Cancelled = "cancelled",
    /// No identity, or one we do not accept.
    Unauthenticated = "unauthenticated",
    /// The identity may not do this.
    PermissionDenied = "permission_denied",
    /// The join token is wrong, used or expired.
    TokenInvalid = "token_invalid",
    /// No such host in the fleet.
    HostNotFound = "host_not_found",
    /// A prefix or name matches more than one host.
    HostAmbiguous = "host_ambiguous",
    /// The call goes to a host, and none was named.
    HostRequired = "host_required",
    /// Another host of the tenant has the name.
    HostNameTaken = "host_name_taken",
    /// The host has no link to Core now.
    HostOffline = "host_offline",
    /// The host's identity was used by two machines; its owner has to decide.
    HostLocked = "host_locked",
    /// The host's owner does not let Core do this.
    CorePermissionDenied = "core_permission_denied",
    /// Core asks for so much that the host's owner has to confirm it.
    ConfirmationRequired = "confirmation_required",
    /// A command came from an older state of Core, or out of order.
    StaleCommand = "stale_command",
    /// No such command.
    CommandNotFound = "command_not_found",
    /// The command was already taken by the host.
    CommandTaken = "command_taken",
    /// No host can take the VM.
    NoHostFits = "no_host_fits",
    /// No such tenant.
    TenantNotFound = "tenant_not_found",
    /// The tenant exists.
    TenantExists = "tenant_exists",
    /// The tenant still has hosts or users.
    TenantInUse = "tenant_in_use",
    /// No such user.
    UserNotFound = "user_not_found",
    /// A quota of the tenant or the user would be exceeded.
    QuotaExceeded = "quota_exceeded",
    /// Core cannot be reached (agent side).
    CoreUnreachable = "core_unreachable",
    /// This host has not joined a fleet.
    NotEnrolled = "not_enrolled",
    /// This host has joined a fleet already.
    AlreadyEnrolled = "already_enrolled",
    /// An input or output error on the host.
    IoFailed = "io_failed",
    /// A fault of ours.
    Internal = "internal",
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// One field of a request that broke a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldViolation {
    /// The field as the API names it, such as `disk_bytes`.
    pub field: String,
    /// The rule it broke.
    pub description: String,
}

/// What went wrong, why, and what to do next.
#[derive(Clone, PartialEq, Eq)]
pub struct Error(Box<Parts>);

#[derive(Clone, PartialEq, Eq)]
struct Parts {
    code: ErrorCode,
    message: String,
    cause: Option<String>,
    hint: Option<String>,
    retry_after: Option<Duration>,
    violations: Vec<FieldViolation>,
    operation: Option<OperationId>,
}

impl Error {
    /// An error with its code and what happened, as a sentence fragment without a full stop.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self(Box::new(Parts {
            code,
            message: message.into(),
            cause: None,
            hint: None,
            retry_after: None,
            violations: Vec::new(),
            operation: None,
        }))
    }

    /// A fault of ours; `message` goes to the log and to the caller.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::Internal, message)
            .hint("look at the agent's log for this request, and report it")
    }

    /// Adds why it happened.
    #[must_use]
    pub fn because(mut self, cause: impl fmt::Display) -> Self {
        self.0.cause = Some(cause.to_string());
        self
    }

    /// Adds the next thing to do, best a command.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    /// Says that the same request may succeed after `delay`.
    #[must_use]
    pub fn retry_after(mut self, delay: Duration) -> Self {
        self.0.retry_after = Some(delay);
        self
    }

    /// Adds a violated field.
    #[must_use]
    pub fn field(mut self, field: impl Into<String>, description: impl Into<String>) -> Self {
        self.0.violations.push(FieldViolation {
            field: field.into(),
            description: description.into(),
        });
        self
    }

    /// Names the operation it belongs to.
    #[must_use]
    pub fn of_operation(mut self, operation: OperationId) -> Self {
        self.0.operation = Some(operation);
        self
    }

    /// The stable code.
    pub fn code(&self) -> ErrorCode {
        self.0.code
    }

    /// What happened.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// Why it happened, if that is known.
    pub fn cause(&self) -> Option<&str> {
        self.0.cause.as_deref()
    }

    /// What to do next, if there is something.
    pub fn hint_text(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// After which time a retry may help.
    pub fn retry_delay(&self) -> Option<Duration> {
        self.0.retry_after
    }

    /// The fields that broke a rule.
    pub fn violations(&self) -> &[FieldViolation] {
        &self.0.violations
    }

    /// The operation it belongs to.
    pub fn operation(&self) -> Option<OperationId> {
        self.0.operation
    }
}

impl fmt::Display for Error {
    /// Message and cause on one line; the hint is for those who lay it out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)?;
        if let Some(cause) = &self.0.cause {
            write!(f, ": {cause}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}] {self}", self.0.code)
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique_snake_case_and_readable_back() {
        let mut seen = std::collections::BTreeSet::new();
        for code in ErrorCode::ALL {
            let text = code.as_str();
            assert!(
                text.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'),
                "{text}"
            );
            assert!(seen.insert(text), "{text} stands twice");
            assert_eq!(ErrorCode::parse(text), Some(*code));
        }
        assert_eq!(ErrorCode::parse("no_such_code"), None);
    }
}
