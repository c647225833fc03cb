//! The application's side of the link to Ghost Core, over the world of fakes.

mod budget;
mod commands;
mod crash;
mod report;
mod rights;

use std::sync::Arc;
use std::time::Duration;

use ghost_application::fleet::Fleet;
use ghost_domain::fleet::{
    CommandAction, CommandOutcome, CommandStatus, CorePermissions, CreateVmCommand, FleetCommand,
    FleetPrincipal,
};
use ghost_domain::ports::CoreLinkHandler;
use ghost_domain::{ByteSize, CommandId, Principal, PrincipalSource, Role, TenantName};

use crate::world::{Agent, World};

pub(crate) const CORE: &str = "core-1";

pub(crate) fn alice(role: Role) -> FleetPrincipal {
    FleetPrincipal {
        name: "acme/alice".into(),
        tenant: Some(TenantName::new("acme").unwrap()),
        role,
    }
}

/// Alice as a call through Core brings her.
pub(crate) fn through_core() -> Principal {
    Principal {
        name: "acme/alice".into(),
        role: Role::Operator,
        source: PrincipalSource::Core {
            tenant: Some(TenantName::new("acme").unwrap()),
        },
        guest_access: true,
    }
}

/// The agent in a world, welcomed by a Core.
pub(crate) struct Joined {
    pub(crate) agent: Agent,
    pub(crate) fleet: Arc<Fleet>,
    pub(crate) world: World,
}

impl Joined {
    pub(crate) async fn start(world: &World) -> Self {
        let agent = world.start().await;
        let fleet = agent.application.fleet();
        fleet.welcomed(CORE, 1).await.unwrap();
        Self {
            agent,
            fleet,
            world: world.clone(),
        }
    }

    pub(crate) async fn with(permissions: CorePermissions) -> Self {
        let world = World::new();
        *world.permissions.lock() = permissions;
        Self::start(&world).await
    }

    /// The command of the next number.
    pub(crate) fn command(&self, generation: u64, action: CommandAction) -> FleetCommand {
        FleetCommand {
            id: CommandId::random(),
            epoch: 1,
            generation,
            previous: generation - 1,
            deadline: self.world.now().after(Duration::from_secs(3600)),
            issuer: alice(Role::Operator),
            action,
        }
    }

    pub(crate) fn outcome(&self, generation: u64) -> Option<CommandOutcome> {
        self.fleet
            .outcomes()
            .into_iter()
            .find(|one| one.generation == generation)
    }

    /// Waits until a command's outcome will not change any more.
    pub(crate) async fn settled(&self, generation: u64) -> CommandOutcome {
        self.agent
            .until("the command's end", |_| {
                Box::pin(async move {
                    self.outcome(generation)
                        .is_some_and(|one| one.status.is_finished())
                })
            })
            .await;
        self.outcome(generation).unwrap()
    }

    /// Sends and follows a command that can begin at once.
    pub(crate) async fn done(&self, generation: u64, action: CommandAction) -> CommandOutcome {
        let command = self.command(generation, action);
        let first = self.fleet.command(command).await.unwrap();
        if first.status.is_finished() {
            return first;
        }
        assert_eq!(first.status, CommandStatus::Accepted);
        self.settled(generation).await
    }
}

pub(crate) fn create(name: &str, start: bool) -> CommandAction {
    CommandAction::CreateVm(Box::new(CreateVmCommand {
        name: name.into(),
        image: "tiny".into(),
        vcpus: Some(1),
        memory: Some(ByteSize::from_mib(256)),
        disk: Some(ByteSize::from_mib(256)),
        start,
        ..CreateVmCommand::default()
    }))
}

pub(crate) fn delete(name: &str) -> CommandAction {
    CommandAction::DeleteVm {
        vm: name.into(),
        force: true,
    }
}
