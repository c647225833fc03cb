//! Errors on their way between processes of ours.

use ghost_domain::{Error, ErrorCode, OperationId};
use tonic::Status;
use tonic_types::StatusExt;

/// An error of ours, as it was before it became a status.
pub(super) fn error_of(status: &Status) -> Error {
    let details = status.get_error_details();
    let info = details.error_info();
    let code = info
        .and_then(|info| ErrorCode::parse(&info.reason))
        .unwrap_or(ErrorCode::Internal);
    let mut error = Error::new(code, status.message());
    let told = |name: &str| info.and_then(|info| info.metadata.get(name)).cloned();
    if let Some(cause) = told("cause") {
        error = error.because(cause);
    }
    if let Some(hint) = told("hint") {
        error = error.hint(hint);
    }
    if let Some(operation) = told("operation_id").and_then(|id| id.parse::<OperationId>().ok()) {
        error = error.of_operation(operation);
    }
    if let Some(delay) = details.retry_info().and_then(|retry| retry.retry_delay) {
        error = error.retry_after(delay);
    }
    for one in details
        .bad_request()
        .iter()
        .flat_map(|bad| &bad.field_violations)
    {
        error = error.field(one.field.clone(), one.description.clone());
    }
    error
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use ghost_presentation::grpc::status::to_status;

    use super::*;

    #[test]
    fn an_error_survives_the_way_through_a_status() {
        let error = Error::new(ErrorCode::QuotaExceeded, "too much")
            .because("4 of 3 VMs")
            .hint("delete one")
            .retry_after(Duration::from_secs(3))
            .field("vms", "at most 3")
            .of_operation(OperationId::random());
        assert_eq!(error_of(&to_status(&error)), error);
        assert_eq!(error_of(&Status::internal("x")).code(), ErrorCode::Internal);
    }
}
