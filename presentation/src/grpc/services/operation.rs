//! `OperationService`.

use std::sync::Arc;

use futures::stream;
use ghost_application::UseCases;
use ghost_application::operation::ListOperationsCommand;
use ghost_proto::agent::v1 as message;
use ghost_proto::agent::v1::operation_service_server::OperationService;
use tonic::{Request, Response, Status};

use super::stream::{Answer, until};
use super::{OrStatus, principal};
use crate::convert;

/// Serves operations.
pub(crate) struct Operations(pub(crate) Arc<UseCases>);

type Answered<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl OperationService for Operations {
    async fn get(
        &self,
        request: Request<message::GetOperationRequest>,
    ) -> Answered<message::Operation> {
        let caller = principal(request.extensions())?;
        let view = self
            .0
            .get_operation
            .execute(&caller, &request.get_ref().id)
            .await;
        Ok(Response::new(convert::operation(&view.or_status()?)))
    }

    async fn list(
        &self,
        request: Request<message::ListOperationsRequest>,
    ) -> Answered<message::ListOperationsResponse> {
        let caller = principal(request.extensions())?;
        let message::ListOperationsRequest { vm, all } = request.into_inner();
        let command = ListOperationsCommand {
            vm: Some(vm).filter(|vm| !vm.is_empty()),
            all,
        };
        let views = self.0.list_operations.execute(&caller, &command).await;
        let operations = views.or_status()?.iter().map(convert::operation).collect();
        Ok(Response::new(message::ListOperationsResponse {
            operations,
        }))
    }

    type WatchStream = Answer<message::Operation>;

    async fn watch(
        &self,
        request: Request<message::WatchOperationRequest>,
    ) -> Answered<Self::WatchStream> {
        let caller = principal(request.extensions())?;
        let watch = self
            .0
            .watch_operation
            .execute(&caller, &request.get_ref().id)
            .await;
        let source = stream::unfold(watch.or_status()?, |mut watch| async move {
            let view = watch.next().await?;
            Some((Ok(convert::operation(&view)), watch))
        });
        Ok(Response::new(until(request.extensions(), source)))
    }

    async fn cancel(
        &self,
        request: Request<message::CancelOperationRequest>,
    ) -> Answered<message::Operation> {
        let caller = principal(request.extensions())?;
        let view = self
            .0
            .cancel_operation
            .execute(&caller, &request.get_ref().id)
            .await;
        Ok(Response::new(convert::operation(&view.or_status()?)))
    }
}
