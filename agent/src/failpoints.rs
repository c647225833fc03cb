//! `GHOST_FAILPOINT=operation/step/moment=abort|hang|fail`: breaks an operation on purpose, for the
//! tests of whole agents. Only debug builds know it; a release build refuses to start with it, so
//! that nobody believes to test what is not tested.

use ghost_application::Failpoints;
use ghost_domain::{Error, ErrorCode, Result};

const VARIABLE: &str = "GHOST_FAILPOINT";

/// Reads the variable.
pub(crate) fn from_environment() -> Result<Option<Failpoints>> {
    match std::env::var(VARIABLE) {
        Err(_) => Ok(None),
        Ok(text) => parse(&text).map(Some),
    }
}

#[cfg(not(debug_assertions))]
fn parse(_text: &str) -> Result<Failpoints> {
    Err(Error::new(
        ErrorCode::InvalidArgument,
        format!("{VARIABLE} is set, and this is a release build"),
    )
    .because("failpoints are built into debug builds only")
    .hint(format!("unset {VARIABLE}")))
}

#[cfg(debug_assertions)]
fn parse(text: &str) -> Result<Failpoints> {
    use ghost_application::{FailAction, FailMoment};
    use std::sync::Arc;
    let bad = || {
        Error::new(ErrorCode::InvalidArgument, format!("{VARIABLE}={text:?} is no failpoint"))
            .hint("write operation/step/moment=abort, such as create_vm/define_domain/after_perform=abort")
    };
    let (site, action) = text.split_once('=').ok_or_else(bad)?;
    let mut parts = site.split('/').map(str::to_owned);
    let (Some(operation), Some(step), Some(moment), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(bad());
    };
    let moment = FailMoment::ALL
        .into_iter()
        .find(|known| known.as_str() == moment)
        .ok_or_else(bad)?;
    let action = match action {
        "abort" => FailAction::Abort,
        "hang" => FailAction::Hang,
        "fail" => FailAction::Fail(Error::new(
            ErrorCode::IoFailed,
            "made to fail by a failpoint",
        )),
        _ => return Err(bad()),
    };
    tracing::warn!(failpoint = text, "operations are broken on purpose");
    Ok(Arc::new(move |at| {
        if at.operation == operation && at.step == step && at.moment == moment {
            action.clone()
        } else {
            FailAction::Continue
        }
    }))
}
