//! Which host of a fleet the calls of a run are for.
//!
//! At a host's own agent there is no such question. At Ghost Core every call for a host carries the
//! metadata `ghost-host`; where Core itself chose the host (a VM that it placed), the answer names it
//! and the calls that follow go there.

use std::sync::{Arc, RwLock};

use ghost_proto::core::metadata;
use tonic::metadata::{Ascii, MetadataMap, MetadataValue};
use tonic::service::Interceptor;
use tonic::{Request, Status};

use super::Trace;
use crate::errors::Failure;

/// The host that calls are for, once it is known.
#[derive(Clone, Default)]
pub(crate) struct Route(Arc<RwLock<Option<MetadataValue<Ascii>>>>);

impl Route {
    /// To a host that the person named.
    pub(super) fn to(host: &str) -> Result<Self, Failure> {
        let value = host.parse().map_err(|_| {
            Failure::usage(format!("{host:?} is not a host"))
                .because("a name, an id or a unique prefix of an id is expected")
        })?;
        Ok(Self(Arc::new(RwLock::new(Some(value)))))
    }

    fn get(&self) -> Option<MetadataValue<Ascii>> {
        self.0.read().ok().and_then(|host| host.clone())
    }

    /// The host, where one is known.
    pub(crate) fn host(&self) -> Option<String> {
        self.get()
            .and_then(|host| host.to_str().ok().map(str::to_owned))
    }

    /// Takes over the host that an answer names, where none was named before; says which, and why
    /// Core chose it.
    pub(crate) fn learn(&self, answer: &MetadataMap) -> Option<(String, String)> {
        let host = answer.get(metadata::HOST)?;
        let text = |value: &MetadataValue<Ascii>| value.to_str().map(str::to_owned).ok();
        let mut known = self.0.write().ok()?;
        if known.is_some() {
            return None;
        }
        *known = Some(host.clone());
        let why = answer.get(metadata::PLACEMENT).and_then(text);
        Some((text(host)?, why.unwrap_or_default()))
    }
}

/// What goes along with every call.
#[derive(Clone)]
pub(crate) struct Calls {
    pub(super) trace: Trace,
    pub(super) route: Route,
}

impl Interceptor for Calls {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let mut request = self.trace.call(request)?;
        if let Some(host) = self.route.get() {
            request.metadata_mut().insert(metadata::HOST, host);
        }
        Ok(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_core_chose_is_kept_and_one_that_was_named_is_not_replaced() {
        let mut answer = MetadataMap::new();
        answer.insert(metadata::HOST, "pc".parse().unwrap());
        answer.insert(metadata::PLACEMENT, "most room".parse().unwrap());
        let free = Route::default();
        assert_eq!(
            free.learn(&answer),
            Some(("pc".to_owned(), "most room".to_owned()))
        );
        assert_eq!(free.host().as_deref(), Some("pc"));
        let named = Route::to("rack-1").unwrap();
        assert_eq!(named.learn(&answer), None);
        assert_eq!(named.host().as_deref(), Some("rack-1"));
        assert!(Route::to("a\nb").is_err());
    }
}
