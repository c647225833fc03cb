//! From the command line to a channel: which agent is meant, and how it is reached.
//!
//! Only what the chosen way needs is set up: a Unix socket costs no TLS and reads no context. The
//! choice is, in this order: `--endpoint`, `--context`, `GHOST_ENDPOINT`, `GHOST_CONTEXT`, the
//! current context, this host's agent.

mod channel;
mod endpoint;
mod route;
pub(crate) mod tls;
mod trace;

use std::time::Duration;

use ghost_proto::agent::v1::{
    access_service_client::AccessServiceClient, event_service_client::EventServiceClient,
    guest_service_client::GuestServiceClient, host_service_client::HostServiceClient,
    image_service_client::ImageServiceClient, network_service_client::NetworkServiceClient,
    operation_service_client::OperationServiceClient, vm_service_client::VmServiceClient,
};
use ghost_proto::core::v1::fleet_service_client::FleetServiceClient;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Request, Status};

pub(crate) use endpoint::{DEFAULT_SOCKET, Endpoint};
pub(crate) use route::Route;
pub(crate) use trace::Trace;

use crate::arguments::Global;
use crate::errors::{ErrorCode, Failure, Way};
use crate::identity::{Context, Contexts, LOCAL, renew};
use crate::printer::Printer;

/// What a unary request may take before the agent counts as hung.
const CALL_DEADLINE: Duration = Duration::from_secs(30);
/// The agent gives up after a minute.
const GUEST_DEADLINE: Duration = Duration::from_secs(65);
/// The agent's longest deadline is ten minutes.
const LONG_DEADLINE: Duration = Duration::from_secs(605);

/// Room for lists of thousands of VMs.
const MESSAGE_LIMIT: usize = 64 << 20;

/// One run of ghostctl: how it speaks to people, and to which agent.
pub(crate) struct Session {
    /// Where all output goes.
    pub(crate) printer: Printer,
    global: Global,
    trace: Trace,
    route: std::sync::OnceLock<Route>,
}

/// The agent that is meant, and who we are to it.
pub(crate) struct Target {
    /// How it is reached.
    pub(crate) endpoint: Endpoint,
    /// The context, where one was chosen or belongs to the endpoint.
    pub(crate) context: Option<Context>,
}

type Transport = InterceptedService<Channel, route::Calls>;

/// A connection to an agent.
#[derive(Clone)]
pub(crate) struct Agent {
    channel: Channel,
    trace: Trace,
    route: Route,
    faults: tls::Faults,
    endpoint: Endpoint,
    context: Option<String>,
}

impl Session {
    pub(crate) fn new(global: Global) -> Self {
        Self {
            printer: Printer::new(global.output, global.quiet),
            global,
            trace: Trace::new(),
            route: std::sync::OnceLock::new(),
        }
    }

    /// The `--endpoint` of the command line alone, as `context add` needs it.
    pub(crate) fn endpoint_flag(&self) -> Option<&str> {
        self.global.endpoint.as_deref()
    }

    /// Shows a line where `--debug` asks for it.
    pub(crate) fn debug(&self, text: &str) {
        if self.global.debug {
            self.printer.debug(text);
        }
    }

    /// The trace of this run.
    pub(crate) fn trace(&self) -> &Trace {
        &self.trace
    }

    /// Connects to the agent that is meant.
    pub(crate) async fn agent(&self) -> Result<Agent, Failure> {
        let target = self.target()?;
        if self.global.debug {
            self.printer.debug(&format!("endpoint {}", target.endpoint));
            for line in self.trace.lines() {
                self.printer.debug(&line);
            }
        }
        let context = target.context.as_ref();
        let tls = match &target.endpoint {
            Endpoint::Tls { .. } => Some(tls::of_context(context, &target.endpoint)?),
            Endpoint::Unix(_) | Endpoint::Plain { .. } => None,
        };
        let agent = Agent::connect(
            &target.endpoint,
            tls,
            context.map(|context| context.name.clone()),
            &self.trace,
        )
        .await?
        .routed(self.route()?);
        if let Some(context) = context
            && let Err(failure) = renew::if_due(context, &agent).await
        {
            self.printer.warning(&format!(
                "the certificate of the context {} could not be renewed: {}",
                context.name,
                failure.body().error.message
            ));
        }
        Ok(agent)
    }

    /// Which host of a fleet is meant, where one was named.
    fn route(&self) -> Result<Route, Failure> {
        if let Some(route) = self.route.get() {
            return Ok(route.clone());
        }
        let environment = || std::env::var("GHOST_HOST").ok();
        let route = self
            .global
            .host
            .clone()
            .or_else(environment)
            .filter(|host| !host.is_empty())
            .map_or_else(|| Ok(Route::default()), |host| Route::to(&host))?;
        Ok(self.route.get_or_init(|| route).clone())
    }

    /// How the next command begins that is about the same host.
    pub(crate) fn ghostctl(&self) -> String {
        self.way().ghostctl()
    }

    /// Tells of a failure; its hint goes the same way.
    pub(crate) fn failed(&self, failure: &Failure) {
        self.printer.failure(&failure.clone().at(self.way()));
    }

    /// What the environment and the current context say is there for the next command too.
    fn way(&self) -> Way {
        Way {
            endpoint: self.global.endpoint.clone(),
            context: self.global.context.clone(),
            host: self.route.get().and_then(Route::host),
        }
    }

    /// Which agent is meant.
    pub(crate) fn target(&self) -> Result<Target, Failure> {
        let from = |name: &str| std::env::var(name).ok().filter(|text| !text.is_empty());
        let flags = (self.global.endpoint.clone(), self.global.context.clone());
        match flags {
            (None, None) => resolve(from("GHOST_ENDPOINT"), from("GHOST_CONTEXT")),
            (endpoint, context) => resolve(endpoint, context),
        }
    }
}

fn resolve(endpoint: Option<String>, context: Option<String>) -> Result<Target, Failure> {
    let endpoint = endpoint.as_deref().map(Endpoint::parse).transpose()?;
    let context = match (context, &endpoint) {
        (Some(name), _) if name == LOCAL => None,
        (Some(name), _) => Some(Contexts::open()?.load(&name)?),
        // A certificate belongs to an agent: look for the context that was made for this one.
        (None, Some(endpoint @ Endpoint::Tls { .. })) => {
            Contexts::open()?.find_by_endpoint(endpoint)?
        }
        (None, Some(_)) => None,
        (None, None) => Contexts::current()?,
    };
    let endpoint = match (endpoint, &context) {
        (Some(endpoint), _) => endpoint,
        (None, Some(context)) => context.endpoint.clone(),
        (None, None) => Endpoint::local(),
    };
    Ok(Target { endpoint, context })
}

impl Agent {
    /// Connects, so that a failure is told apart from an answer.
    pub(crate) async fn connect(
        endpoint: &Endpoint,
        tls: Option<tls::Setup>,
        context: Option<String>,
        trace: &Trace,
    ) -> Result<Self, Failure> {
        trace.set_used();
        let faults = tls::Faults::default();
        let channel = channel::open(endpoint, tls, &faults, context.as_deref()).await?;
        Ok(Self {
            channel,
            trace: trace.clone(),
            route: Route::default(),
            faults,
            endpoint: endpoint.clone(),
            context,
        })
    }

    /// With the host that calls are for.
    fn routed(self, route: Route) -> Self {
        Self { route, ..self }
    }

    fn transport(&self) -> Transport {
        let calls = route::Calls {
            trace: self.trace.clone(),
            route: self.route.clone(),
        };
        InterceptedService::new(self.channel.clone(), calls)
    }

    /// Where it is.
    pub(crate) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Which host of a fleet calls are for.
    pub(crate) fn route(&self) -> &Route {
        &self.route
    }

    /// What a status of this agent means; a TLS alert that came after the handshake is what a
    /// broken connection was about (TLS 1.3 refuses a client's certificate only then).
    pub(crate) fn failure(&self, status: &Status) -> Failure {
        let failure = Failure::from_status(status);
        match self.faults.take() {
            Some(fault) if failure.is_transport() => {
                tls::failure(&fault, &self.endpoint, self.context.as_deref())
            }
            _ => failure,
        }
    }

    /// What a status of a call about the fleet means; a host's own agent knows no such calls.
    pub(crate) fn fleet_failure(&self, status: &Status) -> Failure {
        if status.code() == tonic::Code::Unimplemented {
            return Failure::new(
                ErrorCode::NotFound,
                format!("{} is a host's own agent and knows no fleet", self.endpoint),
            )
            .hint("name Ghost Core: --context NAME, or --endpoint https://CORE:7443");
        }
        self.failure(status).of_fleet()
    }

    /// Whether a failure says that Core was asked for what only a host has.
    pub(crate) fn is_core(failure: &Failure) -> bool {
        failure.code() == ErrorCode::HostRequired.as_str()
    }

    /// A failed change: where the answer was lost, the same request id finds out what happened.
    pub(crate) fn change_failure(&self, status: &Status, request_id: &str) -> Failure {
        let failure = self.failure(status);
        if failure.is_transport() && failure.code() != ErrorCode::Unauthenticated.as_str() {
            failure.hint(format!(
                "the same again with --request-id {request_id}: it gives the operation if there is one"
            ))
        } else {
            failure
        }
    }

    pub(crate) fn vms(&self) -> VmServiceClient<Transport> {
        VmServiceClient::new(self.transport()).max_decoding_message_size(MESSAGE_LIMIT)
    }

    pub(crate) fn images(&self) -> ImageServiceClient<Transport> {
        ImageServiceClient::new(self.transport()).max_decoding_message_size(MESSAGE_LIMIT)
    }

    pub(crate) fn operations(&self) -> OperationServiceClient<Transport> {
        OperationServiceClient::new(self.transport()).max_decoding_message_size(MESSAGE_LIMIT)
    }

    pub(crate) fn host(&self) -> HostServiceClient<Transport> {
        HostServiceClient::new(self.transport()).max_decoding_message_size(MESSAGE_LIMIT)
    }

    pub(crate) fn networks(&self) -> NetworkServiceClient<Transport> {
        NetworkServiceClient::new(self.transport()).max_decoding_message_size(MESSAGE_LIMIT)
    }

    pub(crate) fn events(&self) -> EventServiceClient<Transport> {
        EventServiceClient::new(self.transport()).max_decoding_message_size(MESSAGE_LIMIT)
    }

    pub(crate) fn guest(&self) -> GuestServiceClient<Transport> {
        GuestServiceClient::new(self.transport()).max_decoding_message_size(MESSAGE_LIMIT)
    }

    /// The fleet, where Core is spoken to.
    pub(crate) fn fleet(&self) -> FleetServiceClient<InterceptedService<Channel, Trace>> {
        let calls = InterceptedService::new(self.channel.clone(), self.trace.clone());
        FleetServiceClient::new(calls).max_decoding_message_size(MESSAGE_LIMIT)
    }

    pub(crate) fn access(&self) -> AccessServiceClient<Transport> {
        AccessServiceClient::new(self.transport()).max_decoding_message_size(MESSAGE_LIMIT)
    }
}

/// A unary request with its deadline.
pub(crate) fn ask<T>(message: T) -> Request<T> {
    ask_within(message, CALL_DEADLINE)
}

/// The same for a short request to a guest, in which programs of the guest have a part.
pub(crate) fn ask_guest<T>(message: T) -> Request<T> {
    ask_within(message, GUEST_DEADLINE)
}

/// The same for what takes its time: hooks of a guest, a new agent for it, the whole audit log. The
/// agent's own deadline for each ends before.
pub(crate) fn ask_long<T>(message: T) -> Request<T> {
    ask_within(message, LONG_DEADLINE)
}

fn ask_within<T>(message: T, deadline: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(deadline);
    request
}
