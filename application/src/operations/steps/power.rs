//! Steps on a VM's power.

use std::time::Duration;

use async_trait::async_trait;
use ghost_domain::{Error, ErrorCode, Progress, Result, VmId};

use crate::operations::step::{Step, StepContext};
use crate::registry::Registry;

/// A guest that is still booting drops the ACPI request, so it is repeated.
const ASK_AGAIN: Duration = Duration::from_secs(5);

/// For undoing: what is not there needs no undo.
pub(crate) fn ignore_absent(outcome: Result<()>) -> Result<()> {
    match outcome {
        Err(error)
            if matches!(
                error.code(),
                ErrorCode::VmNotFound | ErrorCode::VmNotRunning
            ) =>
        {
            Ok(())
        }
        outcome => outcome,
    }
}

/// Powers on; undoing cuts the power again.
pub(crate) struct StartDomain;

#[async_trait]
impl Step for StartDomain {
    fn name(&self) -> &'static str {
        "start_domain"
    }

    fn phase(&self) -> &'static str {
        "starting"
    }

    async fn perform(&self, context: &StepContext) -> Result<()> {
        context.ports.hypervisor.start(context.vm_id()?).await?;
        context.observe().await;
        Ok(())
    }

    async fn undo(&self, context: &StepContext) -> Result<()> {
        ignore_absent(context.ports.hypervisor.power_off(context.vm_id()?).await)?;
        context.observe().await;
        Ok(())
    }
}

/// Cuts the power. There is no way back from it, and a VM that is off is what was asked for.
pub(crate) struct CutPower;

#[async_trait]
impl Step for CutPower {
    fn name(&self) -> &'static str {
        "cut_power"
    }

    fn phase(&self) -> &'static str {
        "cutting the power"
    }

    async fn perform(&self, context: &StepContext) -> Result<()> {
        ignore_absent(context.ports.hypervisor.power_off(context.vm_id()?).await)?;
        context.observe().await;
        Ok(())
    }
}

/// Asks the guest by ACPI, waits, and cuts the power afterwards only where `force` says so.
pub(crate) struct ShutDown {
    pub(crate) timeout: Duration,
    pub(crate) force: bool,
}

#[async_trait]
impl Step for ShutDown {
    fn name(&self) -> &'static str {
        "shut_down"
    }

    fn phase(&self) -> &'static str {
        "shutting down"
    }

    async fn perform(&self, context: &StepContext) -> Result<()> {
        let id = context.vm_id()?;
        context.report(Progress::waiting(self.phase(), "the guest to shut down"));
        let off = tokio::time::timeout(self.timeout, async {
            loop {
                match context.ports.hypervisor.shut_down(id).await {
                    Ok(()) => {}
                    // It went off between our look and our request.
                    Err(error) if error.code() == ErrorCode::VmNotRunning => {}
                    Err(error) => return Err(error),
                }
                if tokio::time::timeout(ASK_AGAIN, wait_off(&context.registry, id))
                    .await
                    .is_ok()
                {
                    return Ok(());
                }
                context.observe().await;
            }
        })
        .await;
        match off {
            Ok(outcome) => outcome,
            Err(_) if self.force => {
                context.report(Progress::phase("cutting the power"));
                ignore_absent(context.ports.hypervisor.power_off(id).await)?;
                context.observe().await;
                Ok(())
            }
            Err(_) => {
                let name = context.vm()?.name.clone();
                Err(Error::new(
                    ErrorCode::DeadlineExceeded,
                    format!("{name} did not shut down within {} s and still runs", self.timeout.as_secs()),
                )
                .because("the guest was asked by ACPI and did not follow")
                .hint(format!("look at its console (ghostctl vm logs {name}), or cut the power: ghostctl vm stop {name} --force")))
            }
        }
    }
}

async fn wait_off(registry: &Registry, id: VmId) {
    let gone = registry
        .wait_for(|model| match model.vms.get(&id) {
            Some(entry) => entry
                .observation
                .as_ref()
                .is_some_and(|seen| !seen.power.is_active())
                .then_some(()),
            None => Some(()),
        })
        .await;
    if gone.is_err() {
        // The registry is going down with the agent; the journal stands.
        std::future::pending::<()>().await;
    }
}

/// Halts the vCPUs; undoing lets them run on.
pub(crate) struct PauseDomain;

#[async_trait]
impl Step for PauseDomain {
    fn name(&self) -> &'static str {
        "pause_domain"
    }

    fn phase(&self) -> &'static str {
        "pausing"
    }

    async fn perform(&self, context: &StepContext) -> Result<()> {
        context.ports.hypervisor.pause(context.vm_id()?).await?;
        context.observe().await;
        Ok(())
    }

    async fn undo(&self, context: &StepContext) -> Result<()> {
        ignore_absent(context.ports.hypervisor.resume(context.vm_id()?).await)?;
        context.observe().await;
        Ok(())
    }
}

/// Lets the vCPUs run on; undoing halts them again.
pub(crate) struct ResumeDomain;

#[async_trait]
impl Step for ResumeDomain {
    fn name(&self) -> &'static str {
        "resume_domain"
    }

    fn phase(&self) -> &'static str {
        "resuming"
    }

    async fn perform(&self, context: &StepContext) -> Result<()> {
        context.ports.hypervisor.resume(context.vm_id()?).await?;
        context.observe().await;
        Ok(())
    }

    async fn undo(&self, context: &StepContext) -> Result<()> {
        ignore_absent(context.ports.hypervisor.pause(context.vm_id()?).await)?;
        context.observe().await;
        Ok(())
    }
}
